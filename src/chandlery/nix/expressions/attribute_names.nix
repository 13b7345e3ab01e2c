# The names that a package set offers below an attribute path; below a package these are its outputs.
#   request  JSON: { source, system, hostPaths, parent: [ "python3Packages" ] }
# A flake is evaluated where no file can be imported: then the other two expressions are given.
{ request, lookUp ? import ./look_up.nix, packageSet ? import ./package_set.nix }:
let
  inherit (builtins.fromJSON request) source system hostPaths parent;
  namesIn = set:
    let found = lookUp.follow parent set;
    in
    if found == null || !builtins.isAttrs found.value then [ ]
    else if (found.value.type or null) == "derivation" then found.value.outputs or [ "out" ]
    else builtins.attrNames found.value;
in
builtins.concatMap namesIn (packageSet { inherit source system hostPaths; })
