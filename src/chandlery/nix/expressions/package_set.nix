# A package source, pinned, as a list of attribute sets: a package is looked up in the first, and then in the next.
#
#   source     { kind, location, ... }, as PinnedSource.to_nix gives it
#   system     the system to choose packages for: "x86_64-linux"
#   hostPaths  what builders of Chandlery's own find of this machine
#   names      the first parts of the attribute paths that are asked for; a large set may offer these alone
{ source, system, hostPaths, names ? null }:
let
  # nixpkgs is a function of { system, config, overlays, ... }; a small set may take less, or nothing.
  call = value:
    if !builtins.isFunction value then value
    else
      let
        arguments = {
          inherit system;
          config = source.config or { };
          overlays = map (path: import (/. + path)) (source.overlays or [ ]);
        };
        accepted = builtins.functionArgs value;
        takesAnything = builtins.match ".*<varpat .*|.*<attrspat[^>]* ellipsis=.*" (builtins.toXML value) != null;
      in
      value (if takesAnything then arguments else builtins.intersectAttrs accepted arguments);

  tree = [ (call (import (/. + source.tree))) ];

  kinds = {
    debian = [
      (import ./debian.nix {
        lock = /. + source.lock;
        inherit (source) mirrors;
        inherit hostPaths names;
      })
    ];
    path = tree;
    git = tree;
    nixpkgs = tree;
    flake =
      let flake = builtins.getFlake source.flake;
      in [ (flake.packages.${system} or { }) (flake.legacyPackages.${system} or { }) ];
  };
in
kinds.${source.kind}
