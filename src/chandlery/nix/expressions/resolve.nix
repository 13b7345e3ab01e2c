# What attribute paths give in a package set: for each a derivation, or why there is none.
#
#   request  JSON: { source, system, hostPaths, attributePaths: [ "git" "python3Packages.numpy" "openssl.dev" ], mark }
#
# A line with `mark` alone is traced when the set has been read; then, as they come, lines of `mark`, the attribute path
# and the answer in JSON. So when something ends the whole evaluation, what was answered before counts, and the first
# that wasn't is the one to blame.
# An answer is { status = "found"; drvPath; outputs; ... } or { status = <reason>; message; }. `path` is the attribute
# path as the set writes it, `place` the part of it that leads to the set that has the first package on it, and
# `otherNames` are what people call that one, those passed after it, and the one at the end.
# A flake is evaluated where no file can be imported: then the other two expressions are given.
{ request, lookUp ? import ./look_up.nix, packageSet ? import ./package_set.nix }:
let
  inherit (builtins.fromJSON request) source system hostPaths attributePaths mark;
  packages = packageSet {
    inherit source system hostPaths;
    names = builtins.concatMap lookUp.namesOf attributePaths;
  };

  attempt = value: builtins.tryEval value;
  isDerivation = value: builtins.isAttrs value && (value.type or null) == "derivation";

  # A package's own check (nixpkgs' meta.available and its parts) may say more than the error that it throws.
  refusal = meta:
    if meta.available or false then "failed"
    else if meta.broken or false then "broken"
    else if meta.insecure or false then "insecure"
    else if meta.unfree or false then "unfree"
    else if meta.unsupported or false then "unsupported"
    else "failed";

  textOr = default: value: if builtins.isString value then value else default;

  # What people call a package beside its attribute path; one that throws where its names should be has none.
  namesOf = package:
    let
      listed = package.otherNames or [ ];
      told = [ (package.pname or null) ] ++ (if builtins.isList listed then listed else [ ]);
      names = builtins.filter builtins.isString told
        ++ (if builtins.isString (package.name or null) then [ (builtins.parseDrvName package.name).name ] else [ ]);
      read = attempt (builtins.deepSeq names names);
    in
    if read.success then read.value else [ ];
  # How many sets there are before the first package.
  setsIn = passed:
    if passed == [ ] || (attempt (isDerivation (builtins.head passed))).value then 0
    else 1 + setsIn (builtins.tail passed);
  packagesIn = builtins.filter (value: (attempt (isDerivation value)).value);

  describe = { value, path, passed }:
    let
      package = value;
      output = package.outputName or "out";
      parsed = builtins.parseDrvName package.name;
      program = attempt (package.meta.mainProgram or null);
    in
    {
      status = "found";
      inherit (package) name drvPath;
      pname = textOr parsed.name (package.pname or null);
      version = textOr parsed.version (package.version or null);
      mainProgram = if program.success then textOr null program.value else null;
      inherit output;
      outputs = builtins.listToAttrs (map
        (name: { inherit name; value = (package.${name} or package).outPath; })
        (package.outputs or [ "out" ])) // { ${output} = package.outPath; };
      inherit path;
      place = builtins.genList (builtins.elemAt path) (setsIn passed);
      otherNames = builtins.concatMap namesOf (packagesIn passed ++ [ package ]);
    };

  resolve = path:
    let
      found = attempt (lookUp.find path packages);
      value = attempt found.value.value;
      isPackage = attempt (isDerivation value.value);
      described = describe found.value;
      checked = attempt (builtins.deepSeq described described);
      status = attempt (refusal (value.value.meta or { }));
    in
    if !found.success then { status = "failed"; }
    else if found.value == null then { status = "not_found"; }
    else if !value.success || !isPackage.success then { status = "failed"; }
    else if !isPackage.value then
      { status = "not_a_package"; message = "it is a ${builtins.typeOf value.value}"; }
    else if checked.success then checked.value
    else { status = if status.success then status.value else "failed"; };

  # What throws is an answer to each attribute path; anything else that is wrong with the set ends it here.
  read = attempt (builtins.all builtins.isAttrs packages);
  answer = path: builtins.trace "${mark} ${builtins.toJSON [ path (resolve path) ]}" null;
in
builtins.seq read (builtins.trace mark (builtins.foldl' (_: answer) null attributePaths))
