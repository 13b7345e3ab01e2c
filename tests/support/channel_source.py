"""A package source that follows a channel of the server on loopback."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from chandlery.machine.download import DownloadLimits
from chandlery.sources.arguments import SetArguments
from chandlery.sources.nixpkgs import NixpkgsAddresses, NixpkgsSource
from chandlery.sources.pins import PinLimits
from tests.support.channel_server import ChannelServer

CHANNEL = "nixos-unstable"
QUICK = DownloadLimits(connect=2.0, silence=0.5, total=10.0, pauses=(0.01,))
# Whoever asks sees what upstream has by then.
ALWAYS = PinLimits(lifetime=0.0, patience=20.0, back_off=0.0)


@asynccontextmanager
async def opened(
    server: ChannelServer,
    folder: Path,
    channel: str = CHANNEL,
    *,
    limits: PinLimits = ALWAYS,
    downloads: DownloadLimits = QUICK,
    addresses: NixpkgsAddresses | None = None,
    tags: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
) -> AsyncIterator[NixpkgsSource]:
    source = NixpkgsSource(
        channel,
        folder / "source",
        addresses or server.addresses,
        SetArguments(folder / "overlays", config),
        tags=tags,
        limits=limits,
        downloads=downloads,
    )
    try:
        yield source
    finally:
        await source.close()
