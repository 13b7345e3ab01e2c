# The names that a package set offers below an attribute path; below a package these are its outputs.
#   request  JSON: { source, system, parent: [ "python3Packages" ] }
{ request }:
let
  inherit (builtins.fromJSON request) source system parent;
  look_up = import ./look_up.nix;
  found = look_up.follow parent (import ./package_set.nix { inherit source system; });
in
if found == null || !builtins.isAttrs found.value then [ ]
else if (found.value.type or null) == "derivation" then found.value.outputs or [ "out" ]
else builtins.attrNames found.value
