"""From settings to the parts of a server: sources, Nix, blobs, index, access control, builder."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from chandlery.access.client_address import is_loopback, parse_networks
from chandlery.access.control import AccessControl, Accounts
from chandlery.access.known_addresses import KnownAddresses
from chandlery.access.public_address import PublicAddress
from chandlery.access.tokens import Tokens, load_key
from chandlery.access.users import Users
from chandlery.builds.build_queue import QueueLimits, admit_all
from chandlery.builds.images import BuildCapacity, Images
from chandlery.builds.limits import BuildLimits
from chandlery.builds.popularity_tables import PopularityTables
from chandlery.builds.recipe import BuildOptions
from chandlery.builds.sqlite.index import SqliteIndex
from chandlery.builds.stores import Stores
from chandlery.errors import InvalidSourceError, SettingsError
from chandlery.image.name import NamePrefixes
from chandlery.image.profile import SHIPPED
from chandlery.layers.root_layer import RootLayerOptions
from chandlery.machine.download import Address, DownloadFailedError
from chandlery.maintenance.garbage_collector import use_interval
from chandlery.nix.configuration import NixOptions
from chandlery.nix.nix import Nix, NixLimits
from chandlery.nix.pinned_source import trust_domain
from chandlery.nix.stores import NixStores
from chandlery.oci.documents import Platform
from chandlery.plan.popularity import Popularity
from chandlery.server.tls import CertificateCopy
from chandlery.settings.settings import Settings
from chandlery.settings.values import without_secrets
from chandlery.sources import kinds
from chandlery.sources.configured import ConfiguredSource, Sources
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.nixpkgs import NixpkgsAddresses
from chandlery.sources.package_source import PackageSource, SourceOptions
from chandlery.storage.kinds import open_blob_store
from chandlery.storage.leases import Leases
from chandlery.telemetry.metrics import Metrics

# What is to be said where `hides_images` is true, and what to do.
HIDDEN = (
    "access rules restrict, so a server that shares the bucket with others answers 404 "
    "for what another one has built"
)
SHOWN = "let all requests of a client go to one server, or let no rule restrict"


@dataclass(frozen=True, slots=True)
class Parts:
    """What the settings describe, opened."""

    sources: Sources
    stores: Stores
    popularity: Popularity

    def nix(self, source: str) -> Nix:
        """Return Nix with the store of a source, by its name."""
        return self.stores.nix.at(_trust_domain(self.sources.of(source)))

    async def check_nix(self) -> None:
        """Make sure that Nix can be used with the store of each source, and make those; raises `NixError`."""
        for domain in trust_domains(self.sources):
            await self.stores.nix.at(domain).check()


@asynccontextmanager
async def open_parts(settings: Settings, popularity: Popularity | None = None) -> AsyncIterator[Parts]:
    """Open the stores and check Nix; `popularity` is what the settings name, if that was read before.

    Raises `StorageError`, `NixError` and `SettingsError`.
    """
    nix = open_nix(settings)
    with (
        open_blob_store(
            settings.storage,
            settings.data_dir,
            settings.storage_options,
            redirects=settings.storage_redirects,
        ) as blobs,
        SqliteIndex(settings.data_dir, use_interval=use_interval(settings.gc_grace)) as index,
        Leases(settings.data_dir) as leases,
    ):
        if popularity is None:
            popularity = await configured_popularity(settings)
        sources = open_sources(settings, nix)
        parts = Parts(sources, Stores(settings.data_dir, nix, blobs, index, leases), popularity)
        try:
            await parts.check_nix()
            yield parts
        finally:
            await sources.close()


async def configured_popularity(settings: Settings) -> Popularity:
    """Return the table that the settings name, empty if they name none. Raises `SettingsError`."""
    if not settings.popularity:
        return Popularity()
    try:
        return await PopularityTables(settings.data_dir).fetch(Address.parse(settings.popularity))
    except DownloadFailedError as error:
        raise SettingsError(f"popularity: {error}") from error
    except ValueError as error:
        raise SettingsError(f"popularity: {Address.parse(settings.popularity)}: {error}") from error


def open_nix(settings: Settings) -> NixStores:
    """Make what calls Nix; nothing is called yet."""
    limits = NixLimits(
        settings.build_timeout,
        settings.evaluation_timeout,
        settings.nix_jobs,
        builder_timeout=settings.builder_timeout,
        evaluation_memory=settings.evaluation_memory,
        free_disk=settings.min_free_disk,
    )
    options = NixOptions(
        settings.allowed_uris, settings.substituters, settings.trusted_public_keys, settings.host_paths
    )
    if settings.nix_store == "machine":
        return NixStores.of_one(Nix(None, limits, options))
    return NixStores(settings.data_dir, limits, options)


def open_sources(settings: Settings, nix: NixStores) -> Sources:
    """Make the package sources; nothing is fetched yet. Raises `SettingsError`."""
    mirrors = DebianMirrors(settings.debian_mirror, settings.debian_security_mirror, settings.debian_keyring)
    nixpkgs = NixpkgsAddresses.parse(settings.nixpkgs_channel_url, settings.nixpkgs_tarball_url)
    sources = {}
    for name, each in settings.all_sources.items():
        lifetime = each.refresh or settings.source_refresh
        options = SourceOptions(each.tags, lifetime, each.config, each.overlays)
        try:
            source = kinds.parse(each.location, settings.data_dir, mirrors, options, nixpkgs=nixpkgs, nix=nix)
        except InvalidSourceError as error:
            raise SettingsError(f"{f'sources.{name}.from' if name else 'source'}: {error}") from error
        wanted = each.platforms or settings.platforms
        platforms = tuple(Platform("linux", architecture) for architecture in wanted)
        sources[name] = ConfiguredSource(source, platforms or source.platforms, lifetime)
    return Sources(sources, settings.default_source)


def trust_domains(sources: Sources) -> list[str]:
    """Return the trust domains of sources, each once."""
    return sorted({_trust_domain(each.source) for each in sources})


def _trust_domain(source: PackageSource) -> str:
    return trust_domain(source.kind, source.location)


def name_prefixes(settings: Settings) -> NamePrefixes:
    """Say what the first parts of image names mean."""
    return NamePrefixes(
        Platform.of_host(),
        frozenset(settings.sources),
        settings.default_source,
        {**SHIPPED, **settings.profiles},
    )


def access_control(settings: Settings, shared: Path | None = None) -> AccessControl | None:
    """Make the gate that the settings describe; None if everybody may have everything.

    `shared` is a folder for the workers of one server, see `AccessControl`. Raises `SettingsError`, also if
    other machines reach the server and nobody has said who may pull.
    """
    anonymous = settings.anonymous == "read"
    if settings.users_file is None:
        if not anonymous and not is_loopback(settings.host):
            raise SettingsError(
                f"other machines can reach {settings.host}: say who may pull, by users_file "
                '(`htpasswd -B` writes one), or let everybody by anonymous = "read"'
            )
        accounts = None
    else:
        if anonymous and not (settings.public_url or settings.tls_certificate):
            raise SettingsError(
                'anonymous = "read" beside users_file takes public_url: where clients get their tokens'
            )
        key = load_key(settings.token_key_file or settings.data_dir / "token-key")
        known = KnownAddresses.in_file(settings.data_dir / "known-addresses")
        accounts = Accounts(
            Users(settings.users_file), Tokens(key, settings.token_lifetime), anonymous, known
        )
    if accounts is None and not settings.access.model_fields_set:
        return None
    address = PublicAddress(settings.public_url, parse_networks(settings.trusted_proxies))
    sources = {
        name: (without_secrets(each.location), *((name,) if name else ()))
        for name, each in settings.all_sources.items()
    }
    sources[""] = sources[settings.default_source]
    return AccessControl(settings.access, sources, address, accounts, shared)


def hides_images(settings: Settings) -> bool:
    """Return whether a server would not serve what another server has put into its bucket.

    With rules that restrict, a digest has to belong to an image of the name that it is asked for by, and only
    the index of the server that built it knows.
    """
    return bool(settings.storage) and settings.access.restrict


def certificate(settings: Settings) -> CertificateCopy | None:
    """Return where the server's certificate is; None without one. Raises `SettingsError`."""
    if settings.tls_certificate is None or settings.tls_key is None:
        if settings.tls_certificate or settings.tls_key:
            raise SettingsError("tls_certificate and tls_key go together")
        return None
    return CertificateCopy(settings.tls_certificate, settings.tls_key, settings.data_dir / "tls.pem")


def open_images(
    settings: Settings,
    parts: Parts,
    root_layer: RootLayerOptions | None = None,
    control: AccessControl | None = None,
    metrics: Metrics | None = None,
    workers: int = 1,
) -> Images:
    """Return images that the caller enters; with several `workers` each has its part of what is allowed."""
    options = BuildOptions(
        settings.max_layers, settings.compression, settings.layer_strategy, root_layer or RootLayerOptions()
    )
    capacity = BuildCapacity(
        ceil(settings.packing_processes / workers),
        QueueLimits(
            settings.parallel_builds,
            ceil(settings.queued_builds / workers),
            settings.abandoned_build_grace,
            settings.failure_memory,
            control.admit_build if control else admit_all,
            # Of a single slot nothing can be reserved: clients take turns.
            reserved=min(1, settings.parallel_builds - 1),
        ),
        BuildLimits(
            settings.max_packages, settings.max_closure_size, settings.min_free_disk, settings.max_build_size
        ),
    )
    return Images(parts.sources, parts.stores, options, capacity, metrics, parts.popularity)
