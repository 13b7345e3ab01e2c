"""How an image describes itself: the config of its containers, labels, the history of its layers. No I/O."""

from collections.abc import Mapping

from chandlery.builds.recipe import Recipe
from chandlery.image.profile import Profile
from chandlery.nix.nix import Resolution
from chandlery.oci.documents import ContainerConfig
from chandlery.plan.layer_group import LayerGroup

ROOT_FILESYSTEM_HISTORY = "chandlery: root filesystem"

_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/games",
    "SSL_CERT_FILE": "/etc/ssl/certs/ca-bundle.crt",
}


def container(profile: Profile, program: str | None, labels: Mapping[str, str]) -> ContainerConfig:
    """Return what a container is started with; what a profile says counts more than the main program."""
    command = profile.command
    if program and not command and not profile.entrypoint:
        command = (program,)
    return ContainerConfig(
        profile.entrypoint,
        command,
        {**_ENVIRONMENT, **profile.environment},
        profile.user_and_group,
        profile.working_directory,
        [port if "/" in port else f"{port}/tcp" for port in profile.exposed_ports],
        {**labels, **profile.labels},
    )


def labels(recipe: Recipe, resolutions: Mapping[str, Resolution]) -> Mapping[str, str]:
    """Return what the image is, and of which revision (image-spec, annotations.md).

    All of it comes from the packages and the pin, so that it is the same on every machine.
    """
    pin, request = recipe.pin, recipe.request
    found = [resolutions[path] for path in request.packages]
    told = {
        "title": request.title,
        "description": ", ".join(f"{each.pname} {each.version}".strip() for each in found),
        "version": found[0].version if len(found) == 1 else "",
        "source": pin.public_location,
        "revision": pin.revision,
    }
    return {f"org.opencontainers.image.{name}": value for name, value in told.items() if value}


def history(group: LayerGroup) -> str:
    """Return what is in a layer, for the image's history."""
    return f"chandlery: {', '.join(path.name for path in group.store_paths)}"
