# How an attribute path finds its value in a package set.
#
# Repository names have no capitals and package sets do. So for each part an exact match wins, and else a name
# that differs only in case: of the first part the first such name, of later parts if there is exactly one. What
# begins with a digit can't be a name in Nix, so `1password` finds `_1password` as well.
# A name that has dots itself (Debian's python3.11) wins over the path that it could be as well.
rec {
  partsOf = path: builtins.filter builtins.isString (builtins.split "\\." path);

  letters = text: builtins.genList (i: builtins.substring i 1 text) (builtins.stringLength text);
  lower = builtins.replaceStrings (letters "ABCDEFGHIJKLMNOPQRSTUVWXYZ") (letters "abcdefghijklmnopqrstuvwxyz");

  # The ways to write a part, the likelier first.
  spellings = part: if builtins.match "[0-9].*" part == null then [ part ] else [ part "_${part}" ];

  # The names in a set that differ from a part only in case.
  alike = set: part:
    let wanted = map lower (spellings part);
    in builtins.filter (name: builtins.elem (lower name) wanted) (builtins.attrNames set);

  # The names in a set that a part may mean: one, unless it is written otherwise in the set.
  meant = set: part:
    let exact = builtins.filter (name: set ? ${name}) (spellings part);
    in if exact != [ ] then [ (builtins.head exact) ] else alike set part;

  # What an attribute path finds in the first of some sets that has it, or null if none does:
  #   value   what stands at its end
  #   path    its parts as the set writes them: [ "python3Packages" "numpy" ]
  #   passed  the values at the end of each part but the last
  find = path: sets:
    if sets == [ ] then null
    else
      let found = findIn path (builtins.head sets);
      in if found != null then found else find path (builtins.tail sets);
  findIn = path: set:
    if set ? ${path} then { value = set.${path}; path = [ path ]; passed = [ ]; } else follow (partsOf path) set;

  # The names by which a set may have to be asked for an attribute path.
  namesOf = path: [ path (builtins.head (partsOf path)) ];

  # The same at the end of the parts, or null where one is missing.
  follow = followAs (names: names != [ ]);
  followAs = acceptable: parts: set:
    let
      names = meant set (builtins.head parts);
      name = builtins.head names;
      rest = followAs (later: builtins.length later == 1) (builtins.tail parts) set.${name};
    in
    if parts == [ ] then { value = set; path = [ ]; passed = [ ]; }
    else if !builtins.isAttrs set || !acceptable names || rest == null then null
    else {
      inherit (rest) value;
      path = [ name ] ++ rest.path;
      passed = if rest.path == [ ] then [ ] else [ set.${name} ] ++ rest.passed;
    };
}
