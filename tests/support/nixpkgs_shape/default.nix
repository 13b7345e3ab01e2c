# A package set of nixpkgs' shape, whose packages build in milliseconds: a stand-in for nixpkgs as a tarball, a git
# repository, a folder or a flake. It needs nothing but itself and the bash of the machine, for which its
# derivations ask (__impureHostDeps), as Nix allows them in Chandlery's configuration.
#
#   system    the system that packages are for; builders run on this machine, whatever it is
#   config    allowUnfree, allowUnfreePackages, allowBroken, permittedInsecurePackages, allowUnsupportedSystem
#   overlays  functions of final and prev
#
# What it has:
#   hello jq greeter SDL2 _1password         programs; greeter needs hello, SDL2 has capitals, _1password a digit
#   openssl bash                             several outputs: bin dev out man (first bin); out dev man
#   devFirst                                 outputs dev out, so by itself it is the dev output
#   python3Packages.{numpy,scipy}            a nested set; haskellPackages.Cabal has capitals
#   python3Packages.deep.er.package          a deeper one
#   cacert iana-etc bashInteractive ...      what every image holds, and what `shell` adds
#   unrar broken insecure only-amd64 only-arm64  refused, as nixpkgs' check-meta.nix does; names with versions are
#                                            unrar-7.0, broken-1.0, insecure-1.0, ...
#   needs-unfree                             allowed itself, but what it needs is refused
#   fails                                    its builder fails with a log
#   throws aborts wrong                      evaluation errors: thrown, aborted, a type that doesn't fit
#   loops eats recursion deep                evaluation that never ends, that takes all memory, two infinite recursions
#   old-hello renamed                        an alias; an alias that throws, as nixpkgs' aliases.nix does
#   imported                                 needs something built while it is evaluated
#   revision                                 a program that prints the content of the file ./revision, which tests change
{ system ? builtins.currentSystem, config ? { }, overlays ? [ ], crossSystem ? null, ... }:
let
  inherit (import ./pkgs/make.nix { inherit system config; }) package program;

  named = make: names: builtins.listToAttrs (map (name: { inherit name; value = make name; }) names);

  packages = self: {
    hello = program "hello" { version = "2.12"; meta.mainProgram = "hello"; };
    jq = program "jq" { };
    greeter = program "greeter" { needs = [ self.hello ]; };
    SDL2 = program "SDL2" { };
    _1password = program "1password" { meta.mainProgram = "op"; };
    revision = program "revision" { says = builtins.readFile ./revision; };

    openssl = package "openssl" { version = "3.0"; outputs = [ "bin" "dev" "out" "man" ]; };
    bash = package "bash" { version = "5.2"; outputs = [ "out" "dev" "man" ]; };
    devFirst = package "dev-first" { outputs = [ "dev" "out" ]; };

    python3Packages = {
      recurseForDerivations = true;
      numpy = program "numpy" { needs = [ self.hello ]; };
      scipy = program "scipy" { needs = [ self.python3Packages.numpy ]; };
      deep.er.package = program "deep" { };
    };
    haskellPackages.Cabal = program "Cabal" { };

    unrar = program "unrar" { version = "7.0"; meta.license = { free = false; shortName = "unfree"; }; };
    broken = program "broken" { meta.broken = true; };
    insecure = program "insecure" { meta.knownVulnerabilities = [ "CVE-0000-0001: it has holes" ]; };
    only-amd64 = program "only-amd64" { meta.platforms = [ "x86_64-linux" ]; };
    only-arm64 = program "only-arm64" { meta.platforms = [ "aarch64-linux" ]; };
    needs-unfree = program "needs-unfree" { needs = [ self.unrar ]; };

    fails = package "fails" { script = "echo 'cc: no such file: main.c' >&2; exit 3"; };
    old-hello = self.hello;
    renamed = throw "'renamed' has been renamed to/replaced by 'hello'"; # as in nixpkgs' aliases.nix
    imported = import (package "generated.nix" { script = "echo 'name: name' > $out"; }) self.hello;
    cacert = package "cacert" {
      script = "mkdir -p $out/etc/ssl/certs; echo certificates > $out/etc/ssl/certs/ca-bundle.crt";
    };
    iana-etc = package "iana-etc" { script = "mkdir -p $out/etc; echo http 80/tcp > $out/etc/services"; };
    bashInteractive = program "bash" { };
  }
  // import ./pkgs/hostile.nix { inherit program; }
  // named (name: program name { }) [
    "coreutils" "findutils" "gawk" "gnugrep" "gnused" "gnutar" "gzip" "less" "nano" "ncurses" "procps" "which"
  ];

  # Each overlay sees what was there before, and what is there in the end.
  apply = overlays: final:
    builtins.foldl' (prev: overlay: prev // overlay final prev) (packages final) overlays;
  final = apply overlays final;
in
final
