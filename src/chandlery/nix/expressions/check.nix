# The smallest build, to see at the start whether this machine lets Nix build at all.
#   hostPaths  JSON: what the builder finds of this machine
{ hostPaths }:
derivation {
  name = "check";
  system = builtins.currentSystem;
  builder = "/bin/bash";
  args = [ "-c" "echo it works > $out" ];
  allowSubstitutes = false;
  __impureHostDeps = builtins.fromJSON hostPaths;
}
