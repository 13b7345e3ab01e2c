# What benchmarks/serving.py has built: a manifest of 1 KB, one of 20 KB, and layers of 100 MB and of 1 GB.
{ system }:
let
  package = name: script: needs:
    derivation {
      inherit name needs;
      system = builtins.currentSystem;
      builder = "/bin/bash";
      args = [ "-euc" "${script}\nexit" ];
      PATH = "/usr/bin:/bin";
      __impureHostDeps =
        [ "/bin" "/usr" "/lib" ] ++ (if builtins.currentSystem == "x86_64-linux" then [ "/lib64" ] else [ ]);
    } // { pname = name; version = "1.0"; meta = { }; };
  small = name: package name "echo ${name} > $out" [ ];
  # Nothing makes it smaller.
  blob = megabytes: package "blob-${megabytes}" "head --bytes ${megabytes}MB /dev/urandom > $out" [ ];
in
{
  few = small "few";
  many = package "many" "echo $needs > $out" (builtins.genList (number: small "part-${toString number}") 90);
  blob-100 = blob "100";
  blob-1000 = blob "1000";
  cacert = package "cacert" "mkdir -p $out/etc/ssl/certs; echo none > $out/etc/ssl/certs/ca-bundle.crt" [ ];
  iana-etc = package "iana-etc" "mkdir -p $out/etc; echo http 80/tcp > $out/etc/services" [ ];
}
