"""A build index for tests: in memory, forgotten with the object; it keeps `build_index_contract`."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from chandlery.builds.index import RecordedBlob, RecordedImage
from chandlery.builds.recipe import Recipe
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, PackedLayer


@dataclass
class Image:
    recipe: Recipe
    image: BuiltImage
    last_used: float
    kept: bool = True
    tags: set[tuple[str, str]] = field(default_factory=set)  # with the name that each is of

    @property
    def blobs(self) -> dict[Digest, int]:
        return {each.digest: each.size for each in self.image.descriptors}


class MemoryBuildIndex:
    def __init__(self, clock: Callable[[], float], use_interval: float = 60.0) -> None:
        self._clock = clock
        self._use_interval = use_interval
        self.images: dict[str, Image] = {}
        self._layers: dict[str, PackedLayer] = {}
        self._resolutions: dict[tuple[str, str], bytes] = {}
        self._image_indexes: dict[Digest, tuple[float, bytes]] = {}

    @property
    def use_interval(self) -> float:
        return self._use_interval

    async def use_image(self, key: str) -> BuiltImage | None:
        return self.images[key].image if await self.remember_use(key) else None

    async def image(self, key: str) -> BuiltImage | None:
        known = self.images.get(key)
        return known.image if known and known.kept else None

    async def remember_image(self, recipe: Recipe, image: BuiltImage) -> None:
        before = self.images.get(recipe.key)
        tags = before.tags if before else set()
        name = recipe.request.name
        tags.add((name, recipe.request.reference))
        self.images[recipe.key] = Image(recipe, image, self._clock(), tags=tags)

    async def image_index(self, digest: Digest) -> bytes | None:
        return self._image_indexes[digest][1] if digest in self._image_indexes else None

    async def remember_image_index(self, content: bytes) -> None:
        self._image_indexes.setdefault(Digest.of(content), (self._clock(), content))

    async def needs(self, name: str, digest: Digest) -> bool:
        named = [each for each in self.images.values() if name in dict(each.tags)]
        return digest in self._image_indexes or any(digest in each.blobs for each in named)

    async def tags(self, name: str) -> list[str]:
        named = [
            (tag, each.recipe.pin.tag) for each in self.images.values() for of, tag in each.tags if of == name
        ]
        return sorted({tag for tags in named for tag in tags})

    async def remember_tag(self, recipe: Recipe) -> None:
        if recipe.key in self.images:
            self.images[recipe.key].tags.add((recipe.request.name, recipe.request.reference))

    async def tagged(self, name: str, digest: Digest | None = None) -> list[tuple[str, Recipe]]:
        return [
            (tag, each.recipe)
            for each in reversed(list(self.images.values()))
            for of, tag in sorted(each.tags)
            if of == name and (digest is None or digest in each.blobs)
        ]

    async def revisions(self, limit: int) -> list[str]:
        last_used_first = sorted(self.images.values(), key=lambda each: -each.last_used)
        return list(dict.fromkeys(each.recipe.pin.revision for each in last_used_first))[:limit]

    async def layers(self, keys: Collection[str]) -> dict[str, PackedLayer]:
        return {key: self._layers[key] for key in keys if key in self._layers}

    async def remember_layer(self, key: str, layer: PackedLayer) -> None:
        self._layers[key] = layer

    async def resolutions(self, pin: str, attribute_paths: Iterable[str]) -> dict[str, bytes]:
        known = self._resolutions
        return {path: known[pin, path] for path in attribute_paths if (pin, path) in known}

    async def remember_resolutions(self, pin: str, records: Mapping[str, bytes]) -> None:
        self._resolutions |= {(pin, path): record for path, record in records.items()}

    async def blob(self, digest: Digest) -> RecordedBlob | None:
        for each in self._needing(digest)[:1]:
            manifests = {manifest.digest for manifest in each.image.manifests.values()}
            return RecordedBlob(each.recipe.key, each.blobs[digest], digest in manifests, each.kept)
        return None

    async def remember_use(self, key: str) -> bool:
        if key not in self.images or not self.images[key].kept:
            return False
        image, now = self.images[key], self._clock()
        if abs(now - image.last_used) >= self._use_interval:
            image.last_used = now
        return True

    async def recipes(self, digest: Digest, limit: int) -> list[Recipe]:
        return [each.recipe for each in self._needing(digest)[:limit]]

    async def least_recently_used(self, used_before: float = float("inf")) -> list[RecordedImage]:
        found = [
            RecordedImage(key, each.recipe.request.name, each.last_used)
            for key, each in self.images.items()
            if each.kept and each.last_used < used_before
        ]
        return sorted(found, key=lambda each: (each.last_used, each.key))

    async def blobs_of(self, key: str) -> dict[Digest, int]:
        return self.images[key].blobs if key in self.images else {}

    async def references(self) -> Counter[Digest]:
        return Counter(digest for each in self.images.values() if each.kept for digest in each.blobs)

    async def needed(self, digests: Iterable[Digest]) -> set[Digest]:
        return set(digests) & set(await self.references())

    async def forget_image(self, key: str, used_before: float) -> bool:
        image = self.images.get(key)
        if image is None or not image.kept or image.last_used >= used_before:
            return False
        image.kept = False
        return True

    async def forget_layers(self, digests: Iterable[Digest]) -> None:
        gone = set(digests)
        self._layers = {
            key: layer for key, layer in self._layers.items() if layer.descriptor.digest not in gone
        }

    async def forget_recipes(self, remembered: int) -> None:
        collected = [(each.last_used, key) for key, each in self.images.items() if not each.kept]
        for _, key in sorted(collected, reverse=True)[remembered:]:
            del self.images[key]
        made = sorted(self._image_indexes, key=lambda each: -self._image_indexes[each][0])
        for digest in made[remembered:]:
            del self._image_indexes[digest]

    def _needing(self, digest: Digest) -> list[Image]:
        needing = [each for each in self.images.values() if digest in each.blobs]
        return sorted(needing, key=lambda each: (not each.kept, -each.last_used))
