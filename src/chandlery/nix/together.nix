# One derivation that needs all of an image's, so that Nix is asked for one thing.
#   name         its name
#   derivations  JSON: [ { "derivation": "/nix/store/<hash>-git-2.39.5.drv", "output": "out" } ]
#   hostPaths    JSON: what the builder finds of this machine
{ name, derivations, hostPaths }:
derivation {
  inherit name;
  system = builtins.currentSystem;
  builder = "/bin/bash";
  args = [ "-c" "echo $needed > $out" ];
  needed = map ({ derivation, output }: (import derivation).${output}) (builtins.fromJSON derivations);
  # No binary cache has it: Nix needn't ask.
  allowSubstitutes = false;
  __impureHostDeps = builtins.fromJSON hostPaths;
}
