"""Debian packages that have the same path, from the repository to the image."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from chandlery.oci.documents import BuiltImage
from chandlery.sources.debian.source import DebianSource
from tests.support import layers
from tests.support.debian_packages import PACKAGES, Deb, program
from tests.support.debian_repository import SUITE, DebianRepository, debian_repository
from tests.support.workshop import Workshop, opened

AGENT = {"Provides": "mail-agent", "Conflicts": "mail-agent", "Replaces": "mail-agent"}


def agent(name: str, **fields: str) -> Deb:
    files = {"usr/sbin/sendmail": program(name.encode()), f"usr/share/{name}": program()}
    return Deb(name, fields={**AGENT, **fields}, files=files)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebianRepository]:
    with debian_repository(tmp_path_factory.mktemp("repository")) as repository:
        repository.publish(
            *PACKAGES,
            *(agent("exim"), agent("postfix"), agent("zmailer")),
            Deb("alert", fields={"Depends": "exim"}),
            Deb("report", fields={"Depends": "zmailer"}),
        )
        yield repository


def sendmail(workshop: Workshop, image: BuiltImage) -> str:
    """Return what a client finds that unpacks one layer after the other."""
    archives = [layers.layer(workshop.blob(each)) for each in image.layers]
    return [
        layers.text(each, "usr/sbin/sendmail") for each in archives if "usr/sbin/sendmail" in each.getnames()
    ][-1]


def layers_of(image: BuiltImage) -> set[str]:
    return {str(each.descriptor.digest) for each in image.layers[:-1]}


async def test_what_was_asked_for_is_in_the_image_and_the_log_of_the_build_says_so(
    tmp_path: Path, repository: DebianRepository
) -> None:
    source = DebianSource(SUITE, tmp_path / "debian", repository.mirrors)
    async with opened(tmp_path, source=source) as workshop:
        with capture_logs() as logs:
            images = {
                asked: await workshop.image("alert", asked, "report")
                for asked in ("bash", "exim", "postfix", "zmailer")
            }
        texts = [path.read_text() for path in workshop.logs()]

        won = {asked: sendmail(workshop, image) for asked, image in images.items()}
        # What merely came along: the first by name.
        assert won == {"bash": "exim", "exim": "exim", "postfix": "postfix", "zmailer": "zmailer"}
        # Layers of packages don't depend on who wins.
        assert layers_of(images["exim"]) == layers_of(images["zmailer"])
    told = (
        "chandlery: postfix and exim have the same paths (/usr/sbin/sendmail): here are those of postfix, "
        "since it was asked for\n"
    )
    assert sum(told in text for text in texts) == 1
    events = [event for event in logs if event["event"] == "packages collide"]
    assert len(events) == len(images)
    assert told[len("chandlery: ") : -1] in events[2]["collisions"]
