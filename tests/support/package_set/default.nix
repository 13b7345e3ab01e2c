# A package set whose packages build in milliseconds, for the tests of all that makes images.
#
# The builder of a `waiting` package waits until the test opens its gate; see package_sets.py.
{ system }:
let
  package = name: { script, needs ? [ ], outputs ? [ "out" ], meta ? { } }:
    derivation {
      name = "${name}-1.0";
      # Builders are programs of this machine, whatever system packages are asked for.
      system = builtins.currentSystem;
      builder = "/bin/bash";
      # Nix kills a builder that closes its output, as `mkdir` does just before it exits; so bash ends last.
      args = [ "-euc" "${script}\nexit" ];
      PATH = "/usr/bin:/bin";
      # The programs of this machine are not in the sandbox of a derivation that doesn't ask for them.
      __impureHostDeps =
        [ "/bin" "/usr" "/lib" ] ++ (if builtins.currentSystem == "x86_64-linux" then [ "/lib64" ] else [ ]);
      inherit needs outputs;
    } // { pname = name; version = "1.0"; inherit meta; };

  # A program that names what it needs, so that Nix finds references to it.
  programOf = name: about: package name ({
    script = ''
      mkdir -p $out/bin
      printf '#!/bin/sh\n# %s\necho ${name}\n' "$needs" > $out/bin/${name}
      chmod +x $out/bin/${name}
    '';
  } // about);
  program = name: programOf name { };

  waiting = name: package name {
    script = ''
      touch /gates/${name}.reached
      until [ -e /gates/${name}.open ]; do sleep 0.01; done
      mkdir $out
    '';
  };

  named = make: names: builtins.listToAttrs (map (name: { inherit name; value = make name; }) names);

  parts = builtins.genList
    (number: package "part-${toString number}" {
      script = "mkdir $out; head --bytes ${toString (1000 * number)} /dev/zero > $out/part-${toString number}";
    }) 12;

  library = package "library" {
    outputs = [ "out" "dev" ];
    script = ''
      mkdir -p $out/lib $dev/include
      echo library > $out/lib/library.so
      echo $out > $dev/include/library.h
    '';
  };
in
{
  hello = program "hello";
  jq = program "jq";
  greeter = programOf "greeter" { needs = [ (program "hello") ]; };
  Capital = program "capital";
  tools.Wrench = program "wrench";
  inherit library;
  application = programOf "application" { needs = [ library ]; };

  # Several programs, of which one is declared to be the main one, and none has the package's name.
  suite = package "suite" {
    script = "mkdir -p $out/bin; for name in one two; do touch $out/bin/$name; chmod +x $out/bin/$name; done";
    meta.mainProgram = "two";
  };
  documentation = package "documentation" { script = "mkdir -p $out/share/doc; echo read > $out/share/doc/me"; };
  assembly = programOf "assembly" { needs = parts; };
  large = package "large" { script = "mkdir $out; head --bytes 8M /dev/zero > $out/zeros"; };

  broken = package "broken" { script = "echo 'cc: no such file: main.c' >&2; exit 3"; };
  # Can't be built before its gate is open.
  flaky = package "flaky" { script = "ls /gates/flaky.open; mkdir $out"; };
  refused = throw "refused is not for you";

  cacert = package "cacert" {
    script = "mkdir -p $out/etc/ssl/certs; echo certificates > $out/etc/ssl/certs/ca-bundle.crt";
  };
  iana-etc = package "iana-etc" { script = "mkdir -p $out/etc; echo http 80/tcp > $out/etc/services"; };
  bashInteractive = program "bash";
}
// named program [
  "coreutils" "findutils" "gawk" "gnugrep" "gnused" "gnutar" "gzip" "less" "nano" "ncurses" "procps" "which"
]
// named waiting [ "waiting-a" "waiting-b" "waiting-c" ]
