# Evaluates one attribute path with nothing to catch its error, so that Nix prints the reason.
#   request  JSON: { source, system, attributePaths: [ one ] }
{ request }:
let
  inherit (builtins.fromJSON request) source system attributePaths;
  inherit (import ./look_up.nix) find namesOf;
  path = builtins.head attributePaths;
  found = find path (import ./package_set.nix { inherit source system; names = namesOf path; });
in
found.value.drvPath or (throw "it is a ${builtins.typeOf found.value}, not a package")
