# The names that a package set offers below an attribute path.
#   request  JSON: { source, system, parent: [ "python3Packages" ] }
{ request }:
let
  inherit (builtins.fromJSON request) source system parent;
  look_up = import ./look_up.nix;
  found = look_up.follow parent (import ./package_set.nix { inherit source system; });
in
if found == null || !builtins.isAttrs found.value then [ ] else builtins.attrNames found.value
