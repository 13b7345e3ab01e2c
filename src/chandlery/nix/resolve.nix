# What attribute paths give in a package set: for each a derivation, or why there is none.
#
#   request  JSON: { source, system, attributePaths: [ "git" "python3Packages.numpy" "openssl.dev" ] }
#
# Gives, per attribute path, { status = "found"; drvPath; outputs; ... } or { status = <reason>; message; }.
{ request }:
let
  inherit (builtins.fromJSON request) source system attributePaths;
  inherit (import ./look_up.nix) find namesOf;
  packages = import ./package_set.nix {
    inherit source system;
    names = builtins.concatMap namesOf attributePaths;
  };

  attempt = value: builtins.tryEval value;
  isDerivation = value: builtins.isAttrs value && (value.type or null) == "derivation";

  # A package's own check (nixpkgs' meta.available and its parts) says more than the error that it throws.
  refusal = meta:
    if meta.broken or false then "broken"
    else if meta.insecure or false then "insecure"
    else if meta.unfree or false then "unfree"
    else if meta.unsupported or false then "unsupported"
    else "failed";

  describe = package:
    let output = package.outputName or "out";
    in {
      status = "found";
      inherit (package) name drvPath;
      pname = package.pname or (builtins.parseDrvName package.name).name;
      version = package.version or (builtins.parseDrvName package.name).version;
      mainProgram = package.meta.mainProgram or null;
      inherit output;
      outputs = builtins.listToAttrs (map
        (name: { inherit name; value = (package.${name} or package).outPath; })
        (package.outputs or [ "out" ]));
    };

  resolve = path:
    let
      found = attempt (find path packages);
      isPackage = attempt (isDerivation found.value.value);
      described = describe found.value.value;
      checked = attempt (builtins.deepSeq described described);
      meta = attempt (builtins.deepSeq (found.value.value.meta or { }) (found.value.value.meta or { }));
    in
    if !found.success then { status = "failed"; }
    else if found.value == null then { status = "not_found"; }
    else if !isPackage.success then { status = "failed"; }
    else if !isPackage.value then { status = "not_a_package"; }
    else if checked.success then checked.value
    else { status = if meta.success then refusal meta.value else "failed"; };
in
builtins.listToAttrs (map (path: { name = path; value = resolve path; }) attributePaths)
