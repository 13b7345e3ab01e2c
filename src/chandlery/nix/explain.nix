# Evaluates one attribute path with nothing to catch its error, so that Nix prints the reason.
#   request  JSON: { source, system, attributePaths: [ one ] }
{ request }:
let
  inherit (builtins.fromJSON request) source system attributePaths;
  inherit (import ./look_up.nix) partsOf follow;
  parts = partsOf (builtins.head attributePaths);
  found = follow parts (import ./package_set.nix { inherit source system; names = [ (builtins.head parts) ]; });
in
found.value.drvPath or (throw "it is a ${builtins.typeOf found.value}, not a package")
