# Evaluates one attribute path with nothing to catch its error, so that Nix prints the reason.
#   request  JSON: { source, system, hostPaths, attributePath }
# A flake is evaluated where no file can be imported: then the other two expressions are given.
{ request, lookUp ? import ./look_up.nix, packageSet ? import ./package_set.nix }:
let
  inherit (builtins.fromJSON request) source system hostPaths attributePath;
  names = lookUp.namesOf attributePath;
  package = (lookUp.find attributePath (packageSet { inherit source system hostPaths names; })).value;
in
builtins.seq package.drvPath (map (output: package.${output}.outPath or package.outPath) (package.outputs or [ ]))
