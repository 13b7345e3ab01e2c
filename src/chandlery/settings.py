"""The only reader of the environment and of the settings file.

A setting is what is found first: an option of the command line, an environment variable (`CHANDLERY_` and its
name), a line of the settings file (TOML; `CHANDLERY_SETTINGS` says where), or its default.
"""

import os
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from chandlery.access_rules import AccessRules
from chandlery.client_address import parse_networks
from chandlery.compression import COMPRESSIONS
from chandlery.errors import SettingsError
from chandlery.layer_plan import STRATEGIES

_FILE_VARIABLE = "CHANDLERY_SETTINGS"


def _default_data_dir() -> Path:
    """Give /var/lib/chandlery for root, and else the user's own place (XDG Base Directory Specification)."""
    if os.geteuid() == 0:
        return Path("/var/lib/chandlery")
    share = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(share).expanduser() / "chandlery"


def _is_collector_named() -> bool:
    """Tell whether OpenTelemetry's own variables say where traces go."""
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return any(os.environ.get(name) for name in names)


class Settings(BaseSettings):
    """Everything that an operator can choose. Times are in seconds."""

    model_config = SettingsConfigDict(env_prefix="CHANDLERY_", extra="forbid", frozen=True)

    data_dir: Path = Field(default_factory=_default_data_dir, description="where everything is kept")
    host: str = Field("127.0.0.1", description="the address to listen on")
    port: int = Field(8080, ge=1, le=65535, description="the port to listen on")

    source: str = Field("debian!bookworm", description="the package set: debian!SUITE or path!FOLDER")
    source_refresh: float = Field(3600.0, gt=0, description="how often to see whether the source has moved")
    debian_mirror: str = Field("", description="the Debian mirror; empty: the one that apt uses here")
    debian_security_mirror: str = Field("", description="likewise, of security updates")
    debian_keyring: str = Field("", description="the file with the keys that sign the Debian index")

    nix_store: Literal["own", "machine"] = Field(
        "own", description="own: a Nix store in the data folder; machine: the one in /nix"
    )
    nix_jobs: int = Field(8, ge=1, description="derivations that Nix fetches or builds at once, per image")
    build_timeout: float = Field(3600.0, gt=0, description="how long Nix may build one image")
    evaluation_timeout: float = Field(120.0, gt=0, description="how long one evaluation may take")
    parallel_builds: int = Field(4, ge=1, description="images built at once; others wait")
    queued_builds: int = Field(100, ge=0, description="builds that may wait; beyond that the answer is 429")
    abandoned_build_grace: float = Field(
        300.0, ge=0, description="how long a build goes on that nobody waits for"
    )
    failure_memory: float = Field(10.0, ge=0, description="how long a failed build is not tried again")
    packing_processes: int = Field(
        default_factory=lambda: os.cpu_count() or 1, ge=1, description="layers packed at once"
    )

    max_packages: int = Field(100, ge=1, description="packages in one image's name")
    max_closure_size: int = Field(20 << 30, ge=1, description="bytes of store paths in one image")
    min_free_disk: int = Field(1 << 30, ge=0, description="bytes; with less free, nothing new is built")

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
    compression: str = Field("gzip", description="of layers: none, gzip or zstd")
    layer_strategy: str = Field("largest-alone", description="how store paths are grouped into layers")

    log_format: Literal["console", "json"] = Field("console", description="for people or for programs")
    traces: bool = Field(
        default_factory=_is_collector_named, description="send traces to where the OTEL_ variables say"
    )

    @field_validator("data_dir", "users_file", "token_key_file", "tls_certificate", "tls_key")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value and value.expanduser().absolute()

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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the places that settings come from: options, environment, file."""
        file = os.environ.get(_FILE_VARIABLE)
        if not file:
            return (init_settings, env_settings)
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=file))

    @classmethod
    def unknown_variables(cls) -> list[str]:
        """Give the environment variables that look like settings and are none, such as mistyped ones.

        They are no error: Kubernetes sets `CHANDLERY_SERVICE_HOST` beside a service of that name.
        """
        known = {f"CHANDLERY_{name}".upper() for name in cls.model_fields} | {_FILE_VARIABLE}
        return sorted(name for name in os.environ if name.startswith("CHANDLERY_") and name not in known)

    @classmethod
    def load(cls, **options: Any) -> Self:
        """Read all settings; `options` that are None were not given. `SettingsError` names what is wrong."""
        file = os.environ.get(_FILE_VARIABLE)
        if file and not Path(file).is_file():
            raise SettingsError(f"{_FILE_VARIABLE} names {file}, which is no file")
        try:
            return cls(**{name: value for name, value in options.items() if value is not None})
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise SettingsError("; ".join(problems)) from error
        except ValueError as error:  # a file that isn't TOML
            raise SettingsError(f"{file}: {error}") from error
