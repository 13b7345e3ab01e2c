# A package source, pinned, as an attribute set of packages.
#
#   source  { kind, location, ... }, as PinnedSource.to_nix gives it
#   system  the system to choose packages for: "x86_64-linux"
#   names   the first parts of the attribute paths that are asked for; a large set may offer these alone
{ source, system, names ? null }:
let
  # nixpkgs is a function of { system, config, overlays, ... }; a small set may take less, or nothing.
  call = value:
    if !builtins.isFunction value then value
    else
      let
        arguments = { inherit system; config = { }; overlays = [ ]; };
        accepted = builtins.functionArgs value;
        takesAnything = builtins.match ".*<varpat .*|.*<attrspat[^>]* ellipsis=.*" (builtins.toXML value) != null;
      in
      value (if takesAnything then arguments else builtins.intersectAttrs accepted arguments);

  kinds = {
    debian = import ./debian.nix {
      lock = /. + source.lock;
      inherit (source) mirrors;
      inherit names;
    };
    path = call (import (/. + source.location));
  };
in
kinds.${source.kind}
