# A Debian suite as a Nix package set, read from the lock that debian_index.py makes.
#
# Each .deb is a fixed-output derivation. Each unit (packages that need each other, mostly one) is a second
# derivation, which unpacks its .debs and refers to the units that it needs: so Nix's closure is Debian's.
# The content stands at / in an image (nix-support/image-layout).
#
#   lock       the folder with the lock
#   mirrors    the address of each repository that the lock counts
#   hostPaths  what the unpacker finds of this machine: itself a program, it needs others
#   names      the names to offer; null for all 100,000 of them, which is slower
{ lock, mirrors, hostPaths, names ? null }:
let
  # A file of the lock is read when one of its names is asked for, and then kept.
  digits = [ "0" "1" "2" "3" "4" "5" "6" "7" "8" "9" "a" "b" "c" "d" "e" "f" ];
  keys = builtins.concatMap (a: builtins.concatMap (b: map (c: a + b + c) digits) digits) digits;
  shards = builtins.listToAttrs (map (key: { name = key; value = readShard key; }) keys);
  readShard = key:
    let shard = builtins.fromJSON (builtins.readFile (lock + "/${key}.json"));
    in { inherit (shard) names; units = builtins.mapAttrs unpack shard.units; };
  shardOf = name: shards.${builtins.substring 0 3 (builtins.hashString "sha256" name)};

  exists = name: (shardOf name).names ? ${name};
  unit = name: (shardOf name).units.${name};

  # Store paths can't have all that a Debian version has; the epoch says nothing to a reader.
  storeName = builtins.replaceStrings [ "~" "%" ":" ] [ "_" "_" "_" ];
  storeVersion = version:
    let withEpoch = builtins.match "[0-9]+:(.*)" version;
    in storeName (if withEpoch == null then version else builtins.head withEpoch);

  fetch = deb: import <nix/fetchurl.nix> {
    name = storeName (baseNameOf deb.filename);
    url = "${builtins.elemAt mirrors deb.repository}/${deb.filename}";
    inherit (deb) sha256;
  };

  unpack = name: { debs, references }:
    let version = if debs == [ ] then "" else storeVersion (builtins.head debs).version;
    in derivation {
      name = if version == "" then name else "${name}-${version}";
      # The unpacker is a program of this machine, whatever the packages' architecture.
      system = builtins.currentSystem;
      builder = "/bin/bash";
      args = [ ./unpack_deb.sh ];
      recorder = ./record_alternatives.sh;
      debs = map fetch debs;
      needed = map unit references;
      __impureHostDeps = hostPaths;
    } // {
      pname = name;
      inherit version;
      members = debs;
      # What else is this derivation; of an alias, which has no content of its own, what it stands for.
      otherNames = map (deb: deb.name) debs
        ++ (if debs == [ ] then builtins.concatMap (needed: (unit needed).otherNames) references else [ ]);
    };

  # A package of a cycle is the whole cycle's derivation, under its own name and version.
  package = name:
    let
      found = unit (shardOf name).names.${name};
      self = builtins.filter (deb: deb.name == name) found.members;
    in
    if self == [ ] then found
    else found // { pname = name; version = storeVersion (builtins.head self).version; };

  allNames = builtins.filter builtins.isString (builtins.split "\n" (builtins.readFile (lock + "/names.txt")));
  aliases = builtins.attrNames (builtins.fromJSON (builtins.readFile ./debian_aliases.json));
  offered = if names == null then allNames else builtins.filter exists (names ++ aliases);
in
builtins.listToAttrs (map (name: { inherit name; value = package name; }) offered)
