import subprocess
from pathlib import Path

from chandlery.nix.closure import StorePath
from chandlery.nix.nix import Nix, NixLimits, NixOptions
from chandlery.sources.binary_cache import NarInfo, crawl, open_cache, popularity_of
from tests.support.nix_package_set import packages, requires_nix, resolve


def copy(store: Path, path: StorePath, cache: Path) -> None:
    command = ["nix", "--extra-experimental-features", "nix-command", "copy", "--no-check-sigs"]
    subprocess.run(
        [*command, "--store", str(store), "--to", cache.as_uri(), path.text], check=True, capture_output=True
    )


@requires_nix
async def test_what_nix_copied_is_read(tmp_path: Path) -> None:
    source = packages(
        tmp_path / "set",
        'lib = build "lib-2" "echo lib > $out"; app = build "app-1" "echo ${lib} > $out";',
    )
    store, copied = tmp_path / "store", tmp_path / "cache"
    nix = Nix(store, NixLimits(jobs=1), NixOptions(substituters=()))
    app = await resolve(nix, source, "app")
    await nix.realise([f"{app.derivation}!{app.output}"], tmp_path / "roots", tmp_path / "log")
    closure = await nix.closure([app.store_path])
    copy(store, app.store_path, copied)

    async with open_cache(copied.as_uri()) as cache:
        infos = await crawl(cache, await cache.store_paths(), tmp_path / "journal")

    assert infos == {
        node.path.base_name: NarInfo(node.nar_size, tuple(path.base_name for path in node.references))
        for node in closure.nodes
    }
    assert dict(popularity_of(infos)) == {"app": 1, "lib": 2}
