# The builder of extra_commands.nix, in Nix's sandbox.
#   $layer   the root filesystem as a tar
#   $script  bash, run in the folder that is / in the image
#   $out     the output, with the root layout
set -euo pipefail
export PATH=/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C
umask 022

mkdir "$out" "$out/nix-support"
tar --extract --file "$layer" --directory "$out" --no-same-owner --same-permissions
echo root > "$out/nix-support/image-layout"

printf '%s\n' "$script" > script
(cd "$out" && bash -euo pipefail "$NIX_BUILD_TOP/script")

# A Nix store keeps one bit of a file's mode, so the modes are kept aside.
cd "$out"
find . -mindepth 1 \( -type f -o -type d \) -not -path './nix-support*' -printf '%04m 0 0 %P\n' \
    > "$NIX_BUILD_TOP/permissions"
mv "$NIX_BUILD_TOP/permissions" nix-support/permissions
chmod --recursive u+rwX .
