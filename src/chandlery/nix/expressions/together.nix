# One derivation that needs all of an image's, so that Nix is asked for one thing.
#   name         its name
#   derivations  JSON: [ { "derivation": "/nix/store/<hash>-git-2.39.5.drv", "output": "out" } ]
#
# Its builder is Nix itself, since what is built beside it may see nothing of this machine. It makes a link whose
# text has the hashes of what is needed, by which Nix finds references.
{ name, derivations }:
let
  hash = path: builtins.substring (builtins.stringLength builtins.storeDir + 1) 32 "${path}";
  holding = paths: derivation {
    inherit name;
    system = builtins.currentSystem;
    builder = "builtin:buildenv";
    derivations = "";
    manifest = builtins.concatStringsSep ":" (map hash paths);
    # No binary cache has it: Nix needn't ask.
    allowSubstitutes = false;
  };
  # A link has 4,095 bytes at most (path_resolution(7)).
  most = 100;
  part = from: count: paths: builtins.genList (number: builtins.elemAt paths (from + number)) count;
  all = paths:
    if builtins.length paths <= most then holding paths
    else holding (part 0 (most - 1) paths
      ++ [ (all (part (most - 1) (builtins.length paths - most + 1) paths)) ]);
in
all (map ({ derivation, output }: (import derivation).${output}) (builtins.fromJSON derivations))
