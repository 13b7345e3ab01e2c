# How an attribute path finds its value in a package set.
#
# Repository names have no capitals and package sets do. So for each part an exact match wins, and else a name
# that differs only in case: of the first part the first such name, of later parts if there is exactly one.
# A name that has dots itself (Debian's python3.11) wins over the path that it could be as well.
rec {
  partsOf = path: builtins.filter builtins.isString (builtins.split "\\." path);

  letters = text: builtins.genList (i: builtins.substring i 1 text) (builtins.stringLength text);
  lower = builtins.replaceStrings (letters "ABCDEFGHIJKLMNOPQRSTUVWXYZ") (letters "abcdefghijklmnopqrstuvwxyz");

  # The names in a set that differ from a part only in case.
  alike = set: part:
    let wanted = lower part;
    in builtins.filter (name: lower name == wanted) (builtins.attrNames set);

  # { value; } of an attribute path, or null if there is none.
  find = path: set: if set ? ${path} then { value = set.${path}; } else follow (partsOf path) set;

  # The names by which a set may have to be asked for an attribute path.
  namesOf = path: [ path (builtins.head (partsOf path)) ];

  # { value; } at the end of the parts, or null where one is missing.
  follow = followAs (names: names != [ ]);
  followAs = acceptable: parts: set:
    let
      part = builtins.head parts;
      names = if set ? ${part} then [ part ] else alike set part;
    in
    if parts == [ ] then { value = set; }
    else if !builtins.isAttrs set || !acceptable names then null
    else followAs (later: builtins.length later == 1) (builtins.tail parts) set.${builtins.head names};
}
