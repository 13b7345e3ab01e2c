from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.image.profile import Account
from chandlery.layers.archive import archive
from chandlery.layers.root_filesystem import root_filesystem
from chandlery.layers.store_reader import Entry, EntryKind, StoreReader
from chandlery.nix.closure import StorePath
from tests.support.physical_store import Executable, Link, PhysicalStore, Tree, closure_of

PROGRAM = Executable()
CERTIFICATES = {
    b"etc/ssl/certs/ca-bundle.crt",
    b"etc/ssl/certs/ca-certificates.crt",
    b"etc/pki/tls/certs/ca-bundle.crt",
    b"etc/ssl/cert.pem",
    b"usr/lib/ssl/cert.pem",
}


@pytest.fixture
def store(tmp_path: Path) -> PhysicalStore:
    return PhysicalStore(tmp_path / "nix/store")


def image(
    store: PhysicalStore,
    *roots: StorePath,
    needed: tuple[StorePath, ...] = (),
    extra: tuple[Entry, ...] = (),
    account: Account | None = None,
) -> Mapping[bytes, Entry]:
    """Return the layer of an image of these store paths, by path."""
    closure = closure_of(*roots, *needed)
    entries = root_filesystem(closure, roots, StoreReader(store.store_root), account=account, extra=extra)
    # The archive checks the order, and that nothing comes twice.
    assert b"".join(archive(entries))
    by_path = {entry.path: entry for entry in entries}
    for path in by_path:
        parent = path.rpartition(b"/")[0]
        assert not parent or by_path[parent].is_directory, path
    return by_path


def links(layer: Mapping[bytes, Entry]) -> dict[bytes, bytes]:
    return {path: entry.target for path, entry in layer.items() if entry.kind is EntryKind.SYMLINK}


def inside(store_path: StorePath, path: str) -> bytes:
    return f"{store_path}/{path}".encode()


# What every image has


def test_an_account_of_its_own_has_a_home_that_it_owns(store: PhysicalStore) -> None:
    layer = image(store, account=Account("nonroot", 65532, 65533))

    passwd, group = layer[b"etc/passwd"].source, layer[b"etc/group"].source
    assert isinstance(passwd, bytes)
    assert isinstance(group, bytes)
    assert passwd.splitlines()[2] == b"nonroot:x:65532:65533:nonroot:/home/nonroot:/bin/sh"
    assert group.splitlines()[2] == b"nonroot:x:65533:"
    home = layer[b"home/nonroot"]
    assert (home.mode, home.uid, home.gid) == (0o700, 65532, 65533)
    assert {(entry.uid, entry.gid) for path, entry in layer.items() if path != b"home/nonroot"} == {(0, 0)}


def test_every_image_has_accounts_and_the_directories_that_programs_count_on(store: PhysicalStore) -> None:
    layer = image(store)

    directories = {path: entry.mode for path, entry in layer.items() if entry.is_directory}
    assert directories == {
        b"etc": 0o755,
        b"root": 0o700,
        b"run": 0o755,
        b"tmp": 0o1777,
        b"var": 0o755,
        b"var/tmp": 0o1777,
    }
    files = {path: entry.source for path, entry in layer.items() if entry.kind is EntryKind.FILE}
    assert set(files) == {b"etc/passwd", b"etc/group", b"etc/nsswitch.conf"}
    passwd = files[b"etc/passwd"]
    assert isinstance(passwd, bytes)
    assert [line.split(b":")[0] for line in passwd.splitlines()] == [b"root", b"nobody"]
    assert all(line.count(b":") == 6 for line in passwd.splitlines())


def test_one_user_owns_all_of_the_layer(store: PhysicalStore) -> None:
    roots = [store.add("git", {"bin/git": PROGRAM}), store.add_root_layout("dash", {"usr/bin/dash": PROGRAM})]
    extra = [Entry.file(b"etc/motd", b"", uid=7)]

    entries = root_filesystem(
        closure_of(*roots), roots, StoreReader(store.store_root), uid=1000, gid=100, extra=extra
    )

    assert {(entry.uid, entry.gid) for entry in entries} == {(1000, 100)}


def test_extra_contents_come_before_everything_but_the_merged_usr(store: PhysicalStore) -> None:
    root = store.add("git", {"bin/git": PROGRAM})
    dash = store.add_root_layout("dash", {"usr/bin/dash": PROGRAM})
    extra = (
        Entry.file(b"bin/git", b"mine"),
        Entry.file(b"etc/passwd", b"me"),
        Entry.file(b"root/.profile", b""),
        Entry.directory(b"tmp", 0o700),
    )

    layer = image(store, root, needed=(dash,), extra=extra)

    assert layer[b"usr/bin/git"].source == b"mine"
    assert layer[b"etc/passwd"].source == b"me"
    assert layer[b"tmp"].mode == 0o700
    assert layer[b"root"].mode == 0o700
    assert links(layer)[b"bin"] == b"usr/bin"


# The store layout


def test_a_package_is_linked_as_symlink_join_does_it(store: PhysicalStore) -> None:
    git = store.add(
        "git",
        {
            "bin/git": PROGRAM,
            "bin/git-shell": Link("git"),
            "share/empty": None,
            "nix-support/setup-hook": b"",
            "lib/nix-support/kept": b"",
        },
    )

    layer = image(store, git)

    assert links(layer) == {
        path.encode(): inside(git, path) for path in ("bin/git", "bin/git-shell", "lib/nix-support/kept")
    }
    assert layer[b"share/empty"].is_directory


def test_packages_are_merged_and_the_first_one_wins(store: PhysicalStore) -> None:
    first = store.add("z-first", {"bin/both": PROGRAM, "share/first/a": b""})
    second = store.add("a-second", {"bin/both": PROGRAM, "bin/second": PROGRAM, "share/first": b"a file"})

    linked = links(image(store, first, second))

    assert linked[b"bin/both"] == inside(first, "bin/both")
    assert linked[b"bin/second"] == inside(second, "bin/second")
    assert linked[b"share/first/a"] == inside(first, "share/first/a")
    assert links(image(store, second, first))[b"share/first"] == inside(second, "share/first")


def test_what_is_needed_but_was_not_asked_for_is_not_linked(store: PhysicalStore) -> None:
    needed = store.add("glibc", {"bin/ldd": PROGRAM})

    assert links(image(store, needed=(needed,))) == {}


def test_a_single_file_is_linked_by_its_name(store: PhysicalStore) -> None:
    script = store.add("hello.sh", PROGRAM)
    linking = store.add("linking", Link(script.text))

    assert links(image(store, script, linking)) == {
        b"hello.sh": script.text.encode(),
        b"linking": linking.text.encode(),
    }


def test_a_link_to_a_directory_leads_to_the_merged_one(store: PhysicalStore) -> None:
    first = store.add("first", {"bin/a": PROGRAM, "sbin": Link("bin"), "include/here": Link(".")})
    second = store.add("second", {"sbin/b": PROGRAM})

    assert links(image(store, first)) == {
        b"bin/a": inside(first, "bin/a"),
        b"sbin": b"/bin",
        b"include/here": b"/include",
    }
    for roots in ((first, second), (second, first)):
        assert links(image(store, *roots)) == {
            b"bin/a": inside(first, "bin/a"),
            b"sbin/b": inside(second, "sbin/b"),
            b"include/here": b"/include",
        }


def test_directories_of_other_store_paths_are_merged_too(store: PhysicalStore) -> None:
    # As buildEnv makes them: a link for a directory that only one package has.
    real = store.add("real", {"bin/real": PROGRAM, "bin/empty": None, "share/a": b"", "binary/no": b""})
    environment = store.add("environment", {"bin": Link(f"{real}/bin")})
    whole = store.add("whole", Link(real.text))
    other = store.add("other", {"bin/other": PROGRAM})

    merged = image(store, other, environment)
    assert links(merged) == {
        b"bin/other": inside(other, "bin/other"),
        b"bin/real": inside(real, "bin/real"),
    }
    assert merged[b"bin/empty"].is_directory
    assert set(links(image(store, whole))) == {b"bin/real", b"share/a", b"binary/no"}


def test_store_paths_that_link_to_each_other_come_to_an_end(store: PhysicalStore) -> None:
    one = store.add("one", {"to": Link("/nix/store/placeholder"), "file": b""})
    two = store.add("two", {"back": Link(f"{one}"), "file": b""})
    (store.physical(one) / "to").unlink()
    (store.physical(one) / "to").symlink_to(two.text)

    assert links(image(store, one)) == {
        b"file": inside(one, "file"),
        b"to/back": inside(two, "back"),
        b"to/file": inside(two, "file"),
    }


def test_env_and_sh_are_linked_where_packages_give_them(store: PhysicalStore) -> None:
    coreutils = store.add("coreutils", {"bin/env": PROGRAM})
    bash = store.add("bash", {"bin/bash": PROGRAM})
    with_sh = store.add("bash-sh", {"bin/bash": PROGRAM, "bin/sh": Link("bash")})

    linked = links(image(store, coreutils, bash))
    assert linked[b"usr/bin/env"] == inside(coreutils, "bin/env")
    assert linked[b"bin/sh"] == inside(bash, "bin/bash")
    assert links(image(store, with_sh))[b"bin/sh"] == inside(with_sh, "bin/sh")
    assert not {b"bin/sh", b"usr/bin/env"} & set(image(store, needed=(coreutils, bash)))


def test_the_ca_bundle_of_nixpkgs_is_where_programs_look(store: PhysicalStore) -> None:
    cacert = store.add("cacert", {"etc/ssl/certs/ca-bundle.crt": b"certificates"})

    linked = links(image(store, cacert))

    bundle = inside(cacert, "etc/ssl/certs/ca-bundle.crt")
    assert linked == dict.fromkeys(CERTIFICATES - {b"usr/lib/ssl/cert.pem"}, bundle)


# The root layout


def test_usr_is_merged_where_something_has_the_root_layout(store: PhysicalStore) -> None:
    dash = store.add_root_layout("dash", {"usr/bin/dash": PROGRAM, "usr/libx32/x": b""})
    git = store.add("git", {"bin/git": PROGRAM, "sbin": Link("bin"), "lib": Link("share"), "share/x": b""})

    layer = image(store, git, needed=(dash,))
    linked = links(layer)

    merged = {name: linked.pop(name) for name in (b"bin", b"sbin", b"lib", b"lib64", b"libx32")}
    assert all(target == b"usr/" + name for name, target in merged.items())
    assert all(layer[b"usr/" + name].is_directory for name in merged)
    assert not {b"lib32", b"libo32"} & set(layer)
    assert linked == {
        b"usr/bin/git": inside(git, "bin/git"),
        b"share/x": inside(git, "share/x"),
        b"usr/bin/sh": b"/usr/bin/dash",
    }
    assert b"bin" not in image(store, git) or image(store, git)[b"bin"].is_directory


def test_a_directory_that_a_link_would_hide_stays(store: PhysicalStore) -> None:
    odd = store.add_root_layout("odd", {"bin/odd": PROGRAM})
    usual = store.add_root_layout("base-files", {"bin": Link("usr/bin"), "usr/bin/usual": PROGRAM})

    assert b"bin" not in image(store, needed=(odd,))
    assert links(image(store, needed=(usual,)))[b"bin"] == b"usr/bin"


def test_content_at_the_root_is_not_linked(store: PhysicalStore) -> None:
    dash = store.add_root_layout("dash", {"usr/bin/dash": PROGRAM, "etc/shells": b""})

    assert not {b"usr/bin/dash", b"etc/shells", b"nix-support"} & set(image(store, dash))


def test_sh_is_linked_only_if_no_package_has_it(store: PhysicalStore) -> None:
    bash = store.add_root_layout("bash", {"usr/bin/bash": PROGRAM})
    dash = store.add_root_layout("dash", {"usr/bin/dash": PROGRAM, "usr/bin/sh": Link("dash")})

    assert links(image(store, bash))[b"usr/bin/sh"] == b"/usr/bin/bash"
    assert b"usr/bin/sh" not in image(store, bash, dash)


def test_the_ca_bundle_of_debian_is_where_programs_look(store: PhysicalStore) -> None:
    certificates = store.add_root_layout("ca", {"etc/ssl/certs/ca-certificates.crt": b"certificates"})
    openssl = store.add_root_layout("openssl", {"etc/ssl/cert.pem": b"its own"})

    linked = links(image(store, certificates, openssl))

    bundle = b"/etc/ssl/certs/ca-certificates.crt"
    places = CERTIFICATES - {b"etc/ssl/certs/ca-certificates.crt", b"etc/ssl/cert.pem"}
    assert {path for path, target in linked.items() if target == bundle} == places


def alternative(*fields: str) -> bytes:
    return "\t".join(fields).encode() + b"\n"


def test_alternatives_are_two_links_as_on_debian(store: PhysicalStore) -> None:
    mawk = store.add_root_layout(
        "mawk",
        {
            "usr/bin/mawk": PROGRAM,
            "usr/share/man/mawk.1.gz": b"",
            "nix-support/alternatives": alternative(
                *("/usr/bin/awk", "awk", "/usr/bin/mawk", "5"),
                *("/usr/share/man/awk.1.gz", "awk.1.gz", "/usr/share/man/mawk.1.gz"),
                *("/usr/share/man/nawk.1.gz", "nawk.1.gz", "/usr/share/man/missing.1.gz"),
            ),
        },
    )

    linked = links(image(store, needed=(mawk,)))

    assert {path: target for path, target in linked.items() if b"awk" in path} == {
        b"etc/alternatives/awk": b"/usr/bin/mawk",
        b"usr/bin/awk": b"/etc/alternatives/awk",
        b"etc/alternatives/awk.1.gz": b"/usr/share/man/mawk.1.gz",
        b"usr/share/man/awk.1.gz": b"/etc/alternatives/awk.1.gz",
    }


def test_alternatives_of_all_store_paths_compete(store: PhysicalStore) -> None:
    def vi(name: str, priority: str) -> StorePath:
        line = alternative("/bin/vi", "vi", f"/bin/{name}", priority)
        return store.add_root_layout(name, {f"usr/bin/{name}": PROGRAM, "nix-support/alternatives": line})

    linked = links(image(store, needed=(vi("vim.tiny", "15"), vi("vim.basic", "30"), vi("nvi", "20"))))

    assert linked[b"etc/alternatives/vi"] == b"/usr/bin/vim.basic"
    assert linked[b"usr/bin/vi"] == b"/etc/alternatives/vi"


def test_an_alternative_does_not_cover_a_file(store: PhysicalStore) -> None:
    lines = alternative("/usr/bin/nc", "nc", "/usr/bin/nc.openbsd", "50") + alternative(
        "/usr/bin/link", "link", "/usr/bin/nc.openbsd", "50"
    )
    netcat = store.add_root_layout(
        "netcat", {"usr/bin/nc.openbsd": PROGRAM, "nix-support/alternatives": lines}
    )
    other = store.add_root_layout("other", {"usr/bin/nc": PROGRAM, "usr/bin/link": Link("nc")})

    linked = links(image(store, needed=(netcat, other)))

    assert b"usr/bin/nc" not in linked
    assert linked[b"usr/bin/link"] == b"/etc/alternatives/link"


# Whatever packages hold

names = st.sampled_from(["bin", "etc", "tmp", "usr", "passwd", "sh", "lib"])
values = st.sampled_from([b"", PROGRAM, Link("bin"), Link("/"), Link(".."), Link("../etc"), None])


@st.composite
def package_trees(draw: st.DrawFn) -> Tree:
    paths = draw(st.lists(st.lists(names, min_size=1, max_size=3).map("/".join), max_size=6, unique=True))
    leaves = [path for path in paths if not any(other.startswith(f"{path}/") for other in paths)]
    return {path: draw(values) for path in leaves}


@given(st.lists(st.tuples(package_trees(), st.booleans()), max_size=3))
def test_any_packages_make_an_archive_in_order(
    tmp_path_factory: pytest.TempPathFactory, packages: list[tuple[Tree, bool]]
) -> None:
    store = PhysicalStore(tmp_path_factory.mktemp("store"))
    roots = [
        (store.add_root_layout if at_root else store.add)(f"package-{number}", tree)
        for number, (tree, at_root) in enumerate(packages)
    ]

    layer = image(store, *roots)

    assert layer[b"tmp"].mode == 0o1777
    assert layer == image(store, *roots)


# The program of an image
