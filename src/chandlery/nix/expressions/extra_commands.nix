# A root filesystem layer after an operator's commands.
#   layer      the store path of the layer as a tar
#   script     bash, run in the folder that is / in the image
#   hostPaths  JSON: what the builder finds of this machine
{ layer, script, hostPaths }:
derivation {
  name = "root-filesystem";
  system = builtins.currentSystem;
  builder = "/bin/bash";
  args = [ ./run_extra_commands.sh ];
  layer = builtins.storePath layer;
  inherit script;
  allowSubstitutes = false;
  __impureHostDeps = builtins.fromJSON hostPaths;
}
