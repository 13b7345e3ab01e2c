from urllib.parse import urljoin, urlsplit

from hypothesis import given
from hypothesis import strategies as st

from chandlery.registry.waiting import WaitPolicy

PATH = "/v2/shell/git/manifests/latest"


def follow(url: str, policy: WaitPolicy) -> list[str]:
    """Return the URLs that a client asks, one after another, until it isn't sent on."""
    urls = [url]
    while True:
        parts = urlsplit(urls[-1])
        location = policy.next_location(parts.path, parts.query)
        if location is None:
            return urls
        urls.append(urljoin(urls[-1], location))


def test_a_request_is_sent_on_to_itself_nine_times() -> None:
    urls = follow(f"http://127.0.0.1:8080{PATH}", WaitPolicy())
    assert len(urls) == 10
    assert {urlsplit(url).path for url in urls} == {PATH}
    assert {urlsplit(url).netloc for url in urls} == {"127.0.0.1:8080"}


def test_it_works_under_another_public_address_and_path() -> None:
    # The proxy takes /registry off, so the server never sees it; the client resolves what it is sent.
    location = WaitPolicy().next_location(PATH, "")
    assert location is not None
    public = urljoin("https://images.example.com/registry/v2/git/manifests/latest", location)
    assert public.startswith("https://images.example.com/registry/v2/git/manifests/latest?")


def test_what_else_the_query_holds_stays() -> None:
    location = WaitPolicy().next_location(PATH, "ns=docker.io&empty=&chandlery-wait=3")
    assert location == "./latest?ns=docker.io&empty=&chandlery-wait=4"


@given(st.text(), st.integers(0, 20))
def test_a_forged_counter_ends_the_wait_or_lets_it_go_on_and_does_nothing_else(
    counter: str, redirections: int
) -> None:
    policy = WaitPolicy(redirections=redirections)
    urls = follow(f"http://127.0.0.1{PATH}?chandlery-wait={counter}", policy)
    assert len(urls) <= redirections + 1
    assert {urlsplit(url).path for url in urls} == {PATH}


def test_a_second_counter_does_not_reset_the_first() -> None:
    assert WaitPolicy().next_location(PATH, "chandlery-wait=9&chandlery-wait=0") is None


def test_a_digest_is_not_taken_for_a_scheme() -> None:
    path = f"/v2/git/manifests/sha256:{'0' * 64}"
    location = WaitPolicy().next_location(path, "")
    assert location is not None
    assert urlsplit(urljoin(f"http://127.0.0.1{path}", location)).path == path
