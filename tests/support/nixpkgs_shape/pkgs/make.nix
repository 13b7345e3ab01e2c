# Makes packages, and refuses some of them as nixpkgs' check-meta.nix does: in `meta`, and by throwing when the
# derivation or an output is asked for.
{ system, config }:
let
  builderSystem = builtins.currentSystem or system;
  version = about: about.version or "1.0";

  # Why a package is refused, or null.
  refusal = pname: name: meta:
    if meta.unfree && !(config.allowUnfree or false) && !(builtins.elem pname (config.allowUnfreePackages or [ ]))
    then "has an unfree license (‘${meta.license.shortName}’)"
    else if meta.broken && !(config.allowBroken or false)
    then "is marked as broken"
    else if meta.unsupported && !(config.allowUnsupportedSystem or false)
    then ''
      is not available on the requested hostPlatform:
        hostPlatform.config = "${system}"
        package.meta.platforms = ${builtins.toJSON meta.platforms}''
    else if meta.insecure && !(builtins.elem name (config.permittedInsecurePackages or [ ]))
    then "is marked as insecure"
    else null;
in
rec {
  package = pname: about:
    let
      name = "${pname}-${version about}";
      outputs = about.outputs or [ "out" ];
      given = about.meta or { };
      meta = {
        platforms = [ "x86_64-linux" "aarch64-linux" ];
        license = { free = true; shortName = "mit"; };
        outputsToInstall = [ (if builtins.elem "bin" outputs then "bin" else builtins.head outputs) ];
      } // given // rec {
        inherit name;
        unfree = !(given.license.free or true);
        broken = given.broken or false;
        insecure = (given.knownVulnerabilities or [ ]) != [ ];
        unsupported = !(builtins.elem system (given.platforms or [ system ]));
        available = refusal pname name meta == null;
      };
      why = refusal pname name meta;
      checked = value:
        if why == null then value
        else throw ''
          Package ‘${name}’ in ${toString ./make.nix}:7 ${why}, refusing to evaluate.

          a) To temporarily allow it, you can use an environment variable
             for a single invocation of the nix tools.
        '';

      derivation' = derivation {
        inherit name outputs;
        system = builderSystem;
        builder = "/bin/bash";
        # Nix kills a builder that closes its output, as `mkdir` does just before it exits; so bash ends last.
        args = [ "-euc" "${about.script or "for output in $outputs; do mkdir \${!output}; done"}\nexit" ];
        PATH = "/usr/bin:/bin";
        needs = about.needs or [ ];
        __impureHostDeps = [ "/bin" "/usr" "/lib" ] ++ (if builderSystem == "x86_64-linux" then [ "/lib64" ] else [ ]);
      };
      extended = output: derivation'.${output} // common // {
        outPath = checked derivation'.${output}.outPath;
        drvPath = checked derivation'.drvPath;
        outputSpecified = true;
      };
      byName = builtins.listToAttrs (map (output: { name = output; value = extended output; }) outputs);
      common = { inherit pname meta; version = version about; passthru = { }; } // byName;
    in
    derivation' // common // {
      outPath = checked derivation'.outPath;
      drvPath = checked derivation'.drvPath;
    };

  # A program that names what it needs, so that Nix finds references to it.
  program = pname: about: package pname ({
    script = ''
      mkdir -p $out/bin
      printf '#!/bin/sh\n# %s\necho ${about.says or pname}\n' "$needs" > $out/bin/${pname}
      chmod +x $out/bin/${pname}
    '';
  } // about);
}
