"""The only reader of the environment and of the settings file.

A setting is what is found first: an option of the command line, an environment variable (`CHANDLERY_` and its
name), a line of the settings file (TOML; `--settings` or `CHANDLERY_SETTINGS` says where), a variable of
Nixery's, or its default.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from chandlery.access.client_address import parse_networks
from chandlery.access.rules import AccessRules
from chandlery.image import name as image_name
from chandlery.image.profile import SHIPPED, Profile
from chandlery.layers.compression import COMPRESSIONS
from chandlery.machine.download import Address
from chandlery.oci.documents import ARCHITECTURES
from chandlery.plan.strategies import DEFAULT_STRATEGY, STRATEGIES
from chandlery.settings import places as setting_places
from chandlery.settings.nixery import NixeryEnvironment
from chandlery.settings.places import Origin, Places
from chandlery.settings.problems import ContradictionError, meant_by, settings_error
from chandlery.settings.values import leaves
from chandlery.storage import kinds as storage_kinds

_FILE_VARIABLE = "CHANDLERY_SETTINGS"

# What Kubernetes sets beside a service that is called chandlery.
_OF_KUBERNETES = re.compile(r"CHANDLERY_(SERVICE_(HOST|PORT)(_.*)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_.*)?)")

Architecture = Literal["amd64", "arm64"]


def _name_prefix(name: str) -> str:
    if not image_name.is_part(name):
        raise ValueError(
            "no image name can begin so: its parts hold a-z and 0-9, with single . or _ or any number of - "
            "between them"
        )
    if name in ARCHITECTURES:
        raise ValueError("in image names this is a platform: choose another name")
    return name


NamePrefix = Annotated[str, AfterValidator(_name_prefix)]


class SourceSettings(BaseModel):
    """One package source: `from` says where it is; a text alone stands for that."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    location: str = Field(alias="from", description="as in `source`, such as nixpkgs!nixos-unstable")
    tags: tuple[str, ...] | None = Field(
        None, description="patterns of the revisions that a tag may choose; unset: what its kind allows"
    )
    platforms: tuple[Architecture, ...] | None = Field(None, description="as the setting of that name")
    refresh: float | None = Field(None, gt=0, description="as `source_refresh`")
    config: Mapping[str, Any] = Field(
        default_factory=dict, description="nixpkgs' config, such as allowUnfree"
    )
    overlays: tuple[Path, ...] = Field((), description="files or folders with Nix overlays")

    @field_validator("overlays")
    @classmethod
    def _there(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        overlays = tuple(each.expanduser().absolute() for each in value)
        for each in overlays:
            if not each.exists():
                raise ValueError(f"there is no file or folder {each}")
        return overlays

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return {"from": value} if isinstance(value, str) else value


def _default_data_dir() -> Path:
    """Return /var/lib/chandlery for root, else the user's own place (XDG Base Directory Specification)."""
    if os.geteuid() == 0:
        return Path("/var/lib/chandlery")
    share = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(share).expanduser() / "chandlery"


def _is_collector_named() -> bool:
    """Return whether OpenTelemetry's own variables say where traces go."""
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return any(os.environ.get(name) for name in names)


@dataclass(frozen=True, slots=True)
class SettingInForce:
    """One value; in a table, `path` leads on to it."""

    path: tuple[str, ...]
    value: Any
    origin: Origin


class Settings(BaseModel):
    """Everything that an operator can choose. Times are in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    data_dir: Path = Field(default_factory=_default_data_dir, description="where everything is kept")
    storage: str = Field(
        "", description="the bucket for blobs, s3://, gs:// or az://BUCKET/PREFIX; empty: in data_dir"
    )
    storage_options: Mapping[str, str] = Field(
        default_factory=dict,
        repr=False,
        description="how to reach it: endpoint, region, and what obstore knows",
    )
    storage_redirects: bool = Field(True, description="clients get blobs from the bucket themselves")
    host: str = Field("127.0.0.1", description="the address to listen on")
    port: int = Field(8080, ge=1, le=65535, description="the port to listen on")
    workers: int = Field(1, ge=1, le=64, description="processes that answer requests")

    source: str = Field("debian!trixie", description="the package set, or the name of one of `sources`")
    sources: Mapping[NamePrefix, SourceSettings] = Field(
        default_factory=dict, description="package sets by name, which a prefix of an image name picks"
    )
    source_refresh: float = Field(3600.0, gt=0, description="how long a pin lives before it is renewed")
    platforms: tuple[Architecture, ...] = Field(
        (), description="of image names that choose none; none: the host's, and with debian! amd64 and arm64"
    )
    profiles: Mapping[NamePrefix, Profile] = Field(
        default_factory=dict, description="prefixes of image names: user, command, environment, packages"
    )
    nixpkgs_channel_url: str = Field(
        "https://channels.nixos.org/{channel}/git-revision",
        description="where the revision of a channel is told",
    )
    nixpkgs_tarball_url: str = Field(
        "https://github.com/NixOS/nixpkgs/archive/{revision}.tar.gz",
        description="where a revision of nixpkgs is fetched",
    )
    debian_mirror: str = Field("", description="the Debian mirror; empty: the one that apt uses here")
    debian_security_mirror: str = Field("", description="likewise, of security updates")
    debian_keyring: str = Field("", description="the file with the keys that sign the Debian index")

    nix_store: Literal["own", "machine"] = Field(
        "own", description="own: a Nix store for each source in the data folder; machine: the one in /nix"
    )
    nix_jobs: int = Field(8, ge=1, description="derivations that Nix fetches or builds at once, per image")
    build_timeout: float = Field(3600.0, gt=0, description="how long Nix may build one image")
    builder_timeout: int = Field(0, ge=0, description="how long one builder may run in it; 0: no limit")
    evaluation_timeout: float = Field(120.0, gt=0, description="how long one evaluation may take")
    evaluation_memory: int = Field(8 << 30, ge=0, description="bytes that one may take; 0: no limit")
    allowed_uris: tuple[str, ...] = Field(
        ("https:", "http:"), description="beginnings of addresses that an evaluation may fetch from"
    )
    host_paths: tuple[str, ...] = Field(
        (), description="paths of this machine that builders may ask to see; the Debian set needs none here"
    )
    substituters: tuple[str, ...] | None = Field(
        None, description="binary caches of Nix's own store; unset: Nix's default"
    )
    trusted_public_keys: tuple[str, ...] | None = Field(
        None, description="the keys that sign what they have; unset: Nix's default"
    )
    parallel_builds: int = Field(4, ge=1, description="images built at once; the last is for a new client")
    queued_builds: int = Field(100, ge=0, description="builds that may wait; beyond that the answer is 429")
    abandoned_build_grace: float = Field(
        300.0, ge=0, description="how long a build goes on that nobody waits for; before it begins, 60 s"
    )
    failure_memory: float = Field(10.0, ge=0, description="how long a failed build is not tried again")
    packing_processes: int = Field(
        default_factory=lambda: os.cpu_count() or 1, ge=1, description="layers packed at once"
    )

    max_packages: int = Field(100, ge=1, description="packages in one image's name")
    max_closure_size: int = Field(20 << 30, ge=1, description="bytes of store paths in one image")
    max_build_size: int = Field(
        0,
        ge=0,
        description="bytes that one build may write, also of what isn't in the image; "
        "0: three times max_closure_size",
    )
    min_free_disk: int = Field(
        1 << 30,
        ge=0,
        description="bytes; with less free, nothing is built, and what is built is stopped",
    )

    disk_limit: int = Field(
        0, ge=0, description="bytes of blobs and Nix's own store; beyond, garbage is collected; 0: no limit"
    )
    collect_interval: float = Field(600.0, gt=0, description="how often to see whether that limit is kept")
    gc_grace: float = Field(3600.0, gt=0, description="how long an image is kept after its last use")
    scrub_interval: float = Field(86400.0, gt=0, description="how often every blob's digest is checked")
    scrub_rate: int = Field(20 << 20, ge=0, description="bytes per second that are checked; 0: no checks")

    hold: float = Field(25.0, gt=0, description="how long a request waits before it is sent on to itself")
    redirections: int = Field(9, ge=0, description="how often it is sent on before the answer is 429")
    stop_timeout: int = Field(60, ge=1, description="how long a stop waits for what is being sent")
    trusted_proxies: tuple[str, ...] = Field(
        (), description="addresses and networks of proxies whose X-Forwarded-For counts"
    )
    metrics_networks: tuple[str, ...] = Field(
        ("127.0.0.0/8", "::1"), description="addresses and networks that may see /metrics and /builds"
    )

    users_file: Path | None = Field(None, description="who may pull: a file that `htpasswd -B` writes")
    anonymous: Literal["none", "read"] = Field(
        "none", description="read: who has not logged in may pull, from other machines too"
    )
    access: AccessRules = Field(
        default_factory=AccessRules, description="what may be pulled, and how much: by user and by default"
    )
    public_url: str = Field("", description="where clients reach the server, if that isn't where it listens")
    token_key_file: Path | None = Field(
        None, description="the key that signs tokens; none: one that is made in the data folder"
    )
    token_lifetime: int = Field(3600, ge=600, description="how long a token is good for")
    tls_certificate: Path | None = Field(None, description="the certificate and its chain; none: plain HTTP")
    tls_key: Path | None = Field(None, description="the certificate's key")
    tls_refresh: float = Field(60.0, gt=0, description="how often to see whether they have changed")

    max_layers: int = Field(96, ge=2, le=126, description="layers per image, the root filesystem's included")
    compression: str = Field("gzip", description=f"of layers: {', '.join(COMPRESSIONS)}")
    layer_strategy: str = Field(DEFAULT_STRATEGY, description="how store paths are grouped into layers")
    popularity: str = Field(
        "",
        repr=False,
        description="a table of how much packages are needed, for sets that bring none: a file or an address",
    )

    log_format: Literal["console", "json"] = Field("console", description="for people or for programs")
    traces: bool = Field(
        default_factory=_is_collector_named, description="send traces to where the OTEL_ variables say"
    )

    _places: Places = PrivateAttr(default_factory=lambda: Places(()))
    _notices: tuple[str, ...] = PrivateAttr(())

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python takes it for 1: a limit of one byte, say.
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation in (int, float):
            raise ValueError(f"{str(value).lower()} is no number")
        return value

    @field_validator("data_dir", "users_file", "token_key_file", "tls_certificate", "tls_key")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value and value.expanduser().absolute()

    @field_validator("storage")
    @classmethod
    def _bucket(cls, value: str) -> str:
        return storage_kinds.normalised(value)

    @field_validator("storage_options", mode="before")
    @classmethod
    def _option_texts(cls, value: Any) -> Any:
        """Take `true` and numbers of a TOML file, too."""
        if not isinstance(value, Mapping):
            return value
        return {
            name: str(each).lower() if isinstance(each, bool | int) else each for name, each in value.items()
        }

    @field_validator("trusted_proxies", "metrics_networks")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        parse_networks(value)
        return value

    @field_validator("public_url")
    @classmethod
    def _url_of_a_host(cls, value: str) -> str:
        if re.fullmatch(r"(https?://[^\s/\"]+/?)?", value) is None:
            raise ValueError("write it as https://registry.example.com, without a path")
        return value.rstrip("/")

    @field_validator("compression")
    @classmethod
    def _known_compression(cls, value: str) -> str:
        if value not in COMPRESSIONS:
            raise ValueError(f"there are {', '.join(COMPRESSIONS)}")
        return value

    @field_validator("layer_strategy")
    @classmethod
    def _known_strategy(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"there are {', '.join(STRATEGIES)}")
        return value

    @field_validator("popularity")
    @classmethod
    def _file_or_address(cls, value: str) -> str:
        if value and "://" not in value:
            value = str(Path(value).expanduser().absolute())
        if value:
            Address.parse(value)
        return value

    @field_validator("nixpkgs_channel_url", "nixpkgs_tarball_url")
    @classmethod
    def _template(cls, value: str, info: ValidationInfo) -> str:
        needed = "{channel}" if info.field_name == "nixpkgs_channel_url" else "{revision}"
        if needed not in value:
            raise ValueError(f"write {needed} where it belongs in the address")
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        for name in self.sources:
            if name in self.profiles or name in SHIPPED:
                raise ContradictionError(
                    ("sources", name), "a profile has this name too, and image names can't tell them apart"
                )
        if "!" not in self.source and self.source not in self.sources:
            meant = meant_by(self.source, self.sources)
            raise ContradictionError(
                ("source",),
                f"{self.source!r} is neither a package set, as debian!<suite> is, nor one of sources"
                + (f": did you mean {meant}?" if meant else ""),
            )
        return self

    @property
    def default_source(self) -> str:
        """The name of the default package source; empty if it has none."""
        return self.source if self.source in self.sources else ""

    @property
    def all_sources(self) -> Mapping[str, SourceSettings]:
        """Every package source by name, the default one included."""
        if self.default_source:
            return self.sources
        return {"": SourceSettings.model_validate(self.source), **self.sources}

    @classmethod
    def load(cls, settings_file: Path | None = None, **options: Any) -> Self:
        """Read all settings; `options` that are None were not given. `SettingsError` names what is wrong."""
        places = [setting_places.options(options), setting_places.variables(cls, os.environ)]
        if settings_file:
            places.append(setting_places.settings_file(settings_file, "--settings"))
        elif file := os.environ.get(_FILE_VARIABLE):
            places.append(setting_places.settings_file(Path(file), _FILE_VARIABLE))
        nixery = NixeryEnvironment(os.environ, Places(places).values())
        together = Places([*places, nixery.place()])
        try:
            settings = cls(**together.values())
        except ValidationError as error:
            # Not as its cause: what it says has the values in it, and some are secret.
            raise settings_error(error, cls, together) from None
        settings._places = together
        settings._notices = (
            *_unknown_variables(cls),
            *_notices_of_nixery(settings, nixery),
            *_notices_of_proxies(settings),
        )
        return settings

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return what every setting is that nobody says, as it is written in a settings file."""
        return cls.model_validate({}).model_dump(mode="json", by_alias=True)

    @property
    def notices(self) -> tuple[str, ...]:
        """What the operator should know about the settings, though nothing is wrong with them."""
        return self._notices

    def origin(self, *path: str) -> Origin:
        """Return where a setting is from; of a table, `path` leads on to a value in it."""
        return self._places.origin(path)

    def in_force(self) -> Iterator[SettingInForce]:
        """Yield every setting, and of tables what is in them."""
        for name in type(self).model_fields:
            # Within a table, what nobody said is left out.
            said = self.model_dump(
                mode="json", by_alias=True, include={name}, exclude_defaults=self._is_table(name)
            )
            for path, value in leaves((name,), said.get(name, {})):
                yield SettingInForce(path, value, self.origin(*path))

    def _is_table(self, name: str) -> bool:
        return isinstance(getattr(self, name), BaseModel | Mapping)


def _unknown_variables(settings_type: type[Settings]) -> Iterator[str]:
    """Yield notices of variables that look like settings and are none, such as mistyped ones."""
    known = {setting_places.variable(name) for name in settings_type.model_fields} | {_FILE_VARIABLE}
    for name in sorted(os.environ):
        if not name.startswith(setting_places.VARIABLE_PREFIX) or _OF_KUBERNETES.fullmatch(name):
            continue
        table = next((each for each in known if name.startswith(f"{each}__")), "")
        if table:
            yield f"the variable {name} is no setting: write {table} as JSON"
        elif name not in known:
            meant = meant_by(name.removeprefix(setting_places.VARIABLE_PREFIX), settings_type.model_fields)
            hint = f": did you mean {setting_places.variable(meant)}?" if meant else ""
            yield f"the variable {name} is no setting{hint}"
    if setting_places.is_of_kubernetes(os.environ.get("CHANDLERY_PORT", "")):
        yield "CHANDLERY_PORT has what Kubernetes sets beside a service of that name: it isn't read"


def _notices_of_nixery(settings: Settings, nixery: NixeryEnvironment) -> Iterator[str]:
    """Yield what is so because of Nixery's variables, and what of them isn't."""
    if nixery.in_use:
        yield f"Nixery's variables are read, since {nixery.in_use} is set"
    if Origin("nixery", nixery.in_use) in (settings.origin("host"), settings.origin("anonymous")):
        yield (
            f"as Nixery does, this listens at {settings.host}, and anonymous is {settings.anonymous!r}: "
            "host and users_file change that"
        )
    for name in nixery.ignored:
        yield f"Nixery's variable {name} means nothing here"


def _notices_of_proxies(settings: Settings) -> Iterator[str]:
    """Yield a notice if clients have to come through a proxy, and none is trusted to say who they are."""
    encrypted_elsewhere = settings.public_url.startswith("https:") and not settings.tls_certificate
    if encrypted_elsewhere and not settings.trusted_proxies:
        yield (
            f"clients come to {settings.public_url} through a proxy, and trusted_proxies is empty: all of "
            "them count as one, for limits and wrong passwords; set trusted_proxies to the proxy's address"
        )
