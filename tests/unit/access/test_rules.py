import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from chandlery.access.rules import AccessRules, Permission, Rule
from chandlery.image.name import ImageRequest, NamePrefixes, parse
from chandlery.oci.documents import Platform

SOURCE = ("debian!bookworm",)
ATTRIBUTE_PATHS = st.lists(st.text("abc019", min_size=1, max_size=5), min_size=1, max_size=3).map(".".join)


def request(name: str) -> ImageRequest:
    return parse(name, "latest", NamePrefixes(Platform("linux", "amd64")))


@pytest.mark.parametrize(
    ("rule", "name", "denied"),
    [
        (Rule(), "shell/git", ()),
        (Rule(deny=("git",)), "git", ("git",)),
        (Rule(deny=("git",)), "git-lfs/gitui", ()),
        (Rule(deny=("git*", "jq")), "curl/git/gitui/jq", ("git", "gitui", "jq")),
        (Rule(allow=("git", "python3*")), "git/python3packages.numpy", ()),
        (Rule(allow=("git", "python3*")), "git/nmap/python3", ("nmap",)),
        (Rule(allow=("python3*",), deny=("*.numpy",)), "python3packages.numpy", ("python3packages.numpy",)),
        (Rule(allow=()), "git", ("git",)),
        # Image names have no capitals, attribute paths do.
        (Rule(deny=("haskellPackages.*",)), "haskellpackages.pandoc", ("haskellpackages.pandoc",)),
        # Everything else that a shell brings needs no mention.
        (Rule(allow=("git",)), "shell/git", ("shell",)),
        (Rule(allow=("shell", "git")), "shell/git", ()),
        (Rule(allow=("git",)), "arm64/git", ()),
        (Rule(deny=("[gj]*",)), "curl/git/jq", ("git", "jq")),
        (Rule(deny=("a.b",)), "axb", ()),
    ],
)
def test_a_rule_names_what_it_refuses(rule: Rule, name: str, denied: tuple[str, ...]) -> None:
    assert rule.denied(request(name), SOURCE) == denied


@pytest.mark.parametrize("name", ["1password-gui", "pkgs.1password-gui", "pkgs.1password-gui.out"])
def test_deny_looks_at_each_part_of_what_is_written(name: str) -> None:
    assert Rule(deny=("1password-g*",)).denied(request(name), SOURCE) == (name,)
    assert Rule(deny=("1password",)).denied(request(name), SOURCE) == ()


def test_a_rule_may_be_about_package_sources() -> None:
    rule, refused = Rule(sources=("path!/srv/*", "debian!bookworm")), ("from the default source",)
    assert rule.denied(request("git"), ["debian!bookworm"]) == ()
    assert rule.denied(request("git"), ["path!/srv/packages"]) == ()
    assert rule.denied(request("git"), ["debian!trixie"]) == refused
    assert rule.denied(request("git"), ["debian!trixie", "next"]) == refused
    assert Rule(sources=("next",)).denied(request("git"), ["debian!trixie", "next"]) == ()


def test_whoever_may_not_pull_from_a_source_is_not_told_where_it_is() -> None:
    prefixes = NamePrefixes(Platform("linux", "amd64"), sources=frozenset({"ours"}))
    asked = parse("ours/git", "latest", prefixes)
    assert Rule(sources=("next",)).denied(asked, ["git!https://git.internal/ours", "ours"]) == ("from ours",)


@pytest.mark.parametrize(
    ("deny", "path", "names", "paths"),
    [
        (("git", "jq"), "pkgs.git", (), ("git", "jq")),
        (("git*", "?", "[a]"), "pkgs.git", (), ()),
        (("python3Packages.n*",), "python311Packages.numpy", (), ("python3Packages.numpy",)),
        (("python3Packages.n*",), "python311Packages.six", ("six",), ()),
        (("a.b.*",), "x.y.z", (), ("a.b.x", "a.b.y", "a.b.z")),
        (("a.*.b",), "x.y.b", ("b",), ("a.y.b",)),
        (("python3Packages.*",), "alias", ("numpy",), ("python3Packages.alias", "python3Packages.numpy")),
    ],
)
def test_what_is_denied_may_be_what_another_path_leads_to(
    deny: tuple[str, ...], path: str, names: tuple[str, ...], paths: tuple[str, ...]
) -> None:
    assert Rule(deny=deny).denied_paths(path.split("."), names) == paths


@pytest.mark.parametrize(
    ("patterns", "chosen", "allowed"),
    [
        (("*",), "debian!sid", True),
        (("debian!bookworm",), "", True),
        (("debian!bookworm",), "debian!sid", False),
        (("debian!*",), "debian!sid", True),
        # Under its name the source is the operator's choice, with all that its tags may choose.
        (("stable",), "debian!sid", True),
    ],
)
def test_a_tag_that_chooses_another_source_has_to_be_allowed(
    patterns: tuple[str, ...], chosen: str, *, allowed: bool
) -> None:
    permission = Permission("bob", Rule(sources=patterns), ("debian!bookworm", "stable"))
    assert permission.allows_tag(chosen) is allowed


@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("git", True),
        ("gitea", True),
        ("jq", False),
        ("git-lfs", False),
        ("pkgs.git", False),
        ("git-x.out", True),
    ],
)
def test_a_name_is_told_if_it_may_be_pulled(name: str, *, may: bool) -> None:
    assert Rule(allow=("git*", "pkgs.*"), deny=("git-lfs", "git-x.*.y", "*.git")).may_name(name) is may


@pytest.mark.parametrize(
    ("rules", "restrict"),
    [
        ({}, False),
        ({"default": {"requests_per_minute": 3}, "users": {"bob": {"builds_per_hour": 1}}}, False),
        ({"default": {"deny": ["nmap"]}}, True),
        ({"default": {"deny": ["nmap"]}, "users": {"bob": {"deny": []}}}, True),
        ({"anonymous": {"allow": ["git"]}}, True),
        ({"users": {"bob": {"sources": ["debian!*"]}}}, True),
    ],
)
def test_rules_restrict_if_there_is_something_that_not_everybody_may_have(
    rules: dict[str, object], *, restrict: bool
) -> None:
    assert AccessRules.model_validate(rules).restrict is restrict


@given(st.lists(ATTRIBUTE_PATHS, min_size=1, max_size=5, unique=True), st.data())
def test_what_is_denied_is_denied_whatever_else_is_asked_for(paths: list[str], data: st.DataObject) -> None:
    denied = data.draw(st.sampled_from(paths))
    whole = ImageRequest(tuple(sorted(paths)), Platform("linux", "amd64"))
    assert Rule(deny=(denied,)).denied(whole, SOURCE) == (denied,)
    assert denied not in Rule(allow=(denied,)).denied(whole, SOURCE)


def test_what_a_rule_does_not_say_is_as_in_the_default() -> None:
    rules = AccessRules.model_validate(
        {
            "default": {"deny": ["nmap"], "builds_per_hour": 5},
            "anonymous": {"requests_per_minute": 10},
            "users": {"alice": {"allow": ["git"]}, "ci": {"builds_per_hour": 0, "deny": []}},
        }
    )
    assert rules.of("alice") == Rule(allow=("git",), deny=("nmap",), builds_per_hour=5)
    assert rules.of("ci") == Rule()
    assert rules.of("somebody") == Rule(deny=("nmap",), builds_per_hour=5)
    assert rules.of(None) == Rule(deny=("nmap",), builds_per_hour=5, requests_per_minute=10)


def test_without_rules_everything_is_allowed() -> None:
    assert AccessRules().of(None) == AccessRules().of("alice") == Rule()


@pytest.mark.parametrize(
    "rules",
    [
        {"default": {"allowed": ["git"]}},
        {"user": {}},
        {"default": {"builds_per_hour": -1}},
        {"default": {"allow": "git"}},
    ],
)
def test_a_rule_that_would_not_do_what_it_says_is_refused(rules: object) -> None:
    with pytest.raises(ValidationError):
        AccessRules.model_validate(rules)
