# The smallest build, to see at the start whether this machine lets Nix build at all.
derivation {
  name = "check";
  system = builtins.currentSystem;
  builder = "/bin/bash";
  args = [ "-c" "echo it works > $out" ];
}
