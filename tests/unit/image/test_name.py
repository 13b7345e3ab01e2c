import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.errors import InvalidNameError, InvalidReferenceError
from chandlery.image import name as image_name
from chandlery.image.name import LATEST, ImageRequest, NamePrefixes
from chandlery.image.profile import BASE_PACKAGES, SHIPPED, Profile
from chandlery.oci.documents import Platform

HOST = Platform("linux", "amd64")
ARM64 = Platform("linux", "arm64")
WEB = Profile(packages=("nginx",), user="nonroot", exposed_ports=("80",))
NAME_PREFIXES = NamePrefixes(HOST, frozenset({"debian", "ours"}), "debian", {**SHIPPED, "web": WEB})
META = ("shell", "nonroot", "web", "amd64", "arm64", "debian", "ours")
SHELL = SHIPPED["shell"]

# distribution-spec, "Pulling manifests": [a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*
words = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=6)
separators = st.sampled_from([".", "_", "__"]) | st.integers(1, 4).map("-".__mul__)
parts = st.builds(
    lambda first, rest: first + "".join(separator + word for separator, word in rest),
    words,
    st.lists(st.tuples(separators, words), max_size=3),
).filter(lambda part: part not in META)
packages = st.lists(parts, min_size=1, max_size=5)
tags = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", fullmatch=True).filter(str.isascii)


def parse(name: str, reference: str = LATEST) -> ImageRequest:
    return image_name.parse(name, reference, NAME_PREFIXES)


@given(packages, tags)
def test_every_name_of_the_grammar_is_a_list_of_packages(names: list[str], tag: str) -> None:
    request = parse("/".join(names), tag)
    assert set(request.packages) == set(names)
    assert request.reference == tag
    assert (request.platform, request.profile, request.source) == (HOST, Profile(), "")
    assert request.any_platform


@given(packages, st.randoms())
def test_neither_order_nor_repeats_matter(names: list[str], chance: random.Random) -> None:
    shuffled = [*names, *chance.choices(names, k=2)]
    chance.shuffle(shuffled)
    assert parse("/".join(shuffled)) == parse("/".join(names))


@given(packages, st.lists(st.sampled_from(["shell", "nonroot", "web", "ours"]), unique=True))
def test_the_one_spelling_of_a_name_means_the_same(names: list[str], meta: list[str]) -> None:
    request = parse("/".join([*meta, *names]))
    again = parse(request.name)
    assert again == request
    assert again.name == request.name


@given(st.text(max_size=30) | st.text("abz09./_-A", max_size=12))
def test_a_name_is_taken_only_if_the_grammar_has_it(name: str) -> None:
    grammar = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*"
    if re.fullmatch(grammar, name, re.ASCII):
        image_name.check(name, LATEST)
    else:
        with pytest.raises(InvalidNameError):
            parse(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "Git",
        "git/",
        "/git",
        "git//jq",
        ".git",
        "git.",
        "git..jq",
        "a___b",
        "git+",
        "../etc",
        "git\n",
        "git jq",
        "\u0261it",
        "git٣",
        "a/" * 127 + "ab",
    ],
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidNameError) as caught:
        parse(name)
    assert caught.value.reason


def test_the_longest_name_has_255_characters() -> None:
    assert parse("a" * 255).packages == ("a" * 255,)
    with pytest.raises(InvalidNameError, match="longer than 255"):
        parse("a" * 256)


@pytest.mark.parametrize("reference", ["", ".latest", "-1", "a b", "a" * 129, "sha256:abc", "tag\n", "ä"])
def test_what_is_neither_tag_nor_digest_is_refused(reference: str) -> None:
    with pytest.raises(InvalidReferenceError):
        parse("git", reference)


def test_a_digest_is_a_reference_and_no_tag() -> None:
    digest = "sha256:" + "a" * 64
    assert parse("git", digest).reference == digest
    assert image_name.is_digest(digest)
    assert not image_name.is_digest("sha256-abc")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("git", ImageRequest(("git",), HOST, any_platform=True)),
        ("shell", ImageRequest((), HOST, ("shell",), profile=SHELL, any_platform=True)),
        ("shell/git", ImageRequest(("git",), HOST, ("shell",), profile=SHELL, any_platform=True)),
        ("arm64/git", ImageRequest(("git",), ARM64)),
        ("amd64/git", ImageRequest(("git",), HOST)),
        ("arm64/shell", ImageRequest((), ARM64, ("shell",), profile=SHELL)),
        ("shell/arm64/arm64/shell/git", ImageRequest(("git",), ARM64, ("shell",), profile=SHELL)),
        ("ours/git", ImageRequest(("git",), HOST, source="ours", any_platform=True)),
        ("debian/git", ImageRequest(("git",), HOST, any_platform=True)),
        ("arm64/ours/web/git", ImageRequest(("git",), ARM64, ("web",), "ours", profile=WEB)),
        ("web/arm64/ours/git", ImageRequest(("git",), ARM64, ("web",), "ours", profile=WEB)),
        ("web", ImageRequest((), HOST, ("web",), profile=WEB, any_platform=True)),
    ],
)
def test_platform_source_and_profiles_come_first_in_any_order(name: str, expected: ImageRequest) -> None:
    assert parse(name) == expected


def test_several_profiles_are_one_and_of_single_values_the_last_counts() -> None:
    request = parse("shell/web/nonroot/git")
    assert request.profiles == ("shell", "web", "nonroot")
    assert request.profile.packages == (*SHELL.packages, "nginx")
    assert request.profile.command == ("/bin/bash",)
    assert request.profile.environment == {"LANG": "C.UTF-8", "HOME": "/home/nonroot"}
    assert request.profile.exposed_ports == ("80",)
    assert request.profile.user == "nonroot"
    assert (request.name, request.title) == ("shell/web/nonroot/git", "shell/web/nonroot/git")


def test_a_title_leaves_out_the_source_whose_name_every_server_chooses() -> None:
    request = parse("ours/shell/git")
    assert (request.name, request.title) == ("ours/shell/git", "shell/git")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("git/shell", "shell/git"),
        ("git/arm64", "arm64/git"),
        ("arm64", "no package"),
        ("arm64/amd64/git", "choose one"),
        ("debian/ours/git", "it asks for debian and for ours: choose one"),
        ("git/ours", "ours is a source here, and comes before the packages: ours/git"),
        ("git/web", "web is a profile here"),
        ("ours", "no package"),
        ("nonroot", "no package"),
    ],
)
def test_a_misplaced_meta_package_is_refused_with_what_to_write(name: str, hint: str) -> None:
    with pytest.raises(InvalidNameError, match=hint):
        parse(name)


def test_every_image_has_certificates_and_the_names_of_services() -> None:
    assert set(parse("git").all_packages) == {"git", *BASE_PACKAGES}
    assert BASE_PACKAGES == ("cacert", "iana-etc")


def test_a_shell_image_has_what_people_expect_in_a_shell() -> None:
    request = parse("shell/git")
    assert set(request.all_packages) == {"git", *BASE_PACKAGES, *SHELL.packages}
    assert {"bashInteractive", "coreutils"} <= set(request.all_packages)
    assert list(request.all_packages) == sorted(request.all_packages)


def test_the_command_line_may_name_packages_with_capitals() -> None:
    request = image_name.of_parts(["shell", "haskellPackages.Cabal"], LATEST, NAME_PREFIXES)
    assert request.packages == ("haskellPackages.Cabal",)
    assert request.profile == SHELL
