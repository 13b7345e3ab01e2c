from pathlib import Path

import pytest

from chandlery.errors import SourceUnavailableError
from chandlery.sources.binary_cache import CacheFolder, popularity_of
from tests.support.binary_cache_server import INFOS


def test_popularity_of_a_cache_tells_outputs_apart() -> None:
    popularity = popularity_of(INFOS, source="here")
    assert dict(popularity) == {"app": 1, "lib": 3, "lib-dev": 1}
    assert popularity.source == "here"


async def test_a_folder_without_narinfo_files_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailableError, match="no narinfo files"):
        await CacheFolder(tmp_path).store_paths()
