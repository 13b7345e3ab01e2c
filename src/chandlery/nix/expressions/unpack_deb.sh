# Unpacks .debs into one output; the builder of debian.nix, in Nix's sandbox.
#   $debs     the .deb files
#   $needed   the outputs of the units that these depend on
#   $recorder record_alternatives.sh
#   $out      the output: what stands at / in an image, and beside it nix-support/ with what Chandlery must know
set -euo pipefail
export PATH=/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C
umask 022

support=$out/nix-support
mkdir -p "$support"
echo root > "$support/image-layout"
# Nix finds references by looking for their hashes in an output; this is where it finds these.
printf '%s\n' $needed > "$support/references"

# /usr is merged, as Debian has it since bookworm: what a .deb has in /bin belongs in /usr/bin.
merge_usr='flags=rh;s,^\./\(bin\|sbin\|lib\|lib32\|lib64\|libx32\|libo32\)\(/.*\)\?$,./usr/\1\2,'

for deb in $debs; do
    # A Nix store has no device files, and a container gets its own /dev.
    dpkg-deb --fsys-tarfile "$deb" |
        tar --extract --directory "$out" --no-same-owner --no-same-permissions --delay-directory-restore \
            --keep-directory-symlink --exclude './dev/*' --transform "$merge_usr"
    # A Nix store keeps one bit of a file's mode and no owner; what a .deb says beyond that is kept aside.
    dpkg-deb --fsys-tarfile "$deb" |
        tar --list --verbose --numeric-owner --quoting-style=literal \
            --show-transformed-names --transform "$merge_usr" |
        perl -ne '
            my ($mode, $owner, $path) = m{^[-dh](\S{9}) +(\S+) +\d+ +\S+ +\S+ \./(.+)$} or next;
            $path =~ s{ link to .*$}{} if /^h/;
            $path =~ s{/$}{};
            my $octal = 0;
            my @bits = (0400, 0200, 0100, 040, 020, 010, 4, 2, 1);
            for my $i (0 .. 8) {
                my $letter = substr($mode, $i, 1);
                $octal |= $bits[$i] if $letter =~ /[rwxst]/;
                $octal |= 04000 >> ($i - 2) / 3 if $letter =~ /[sStT]/;
            }
            next if ($octal == 0755 || $octal == 0644) && $owner eq "0/0";
            printf "%04o %s %s\n", $octal, join(" ", split("/", $owner)), $path;
        ' >> "$support/permissions"
    dpkg-deb --ctrl-tarfile "$deb" > control.tar
    if tar --extract --to-stdout --file control.tar ./postinst > postinst 2> missing; then
        bash "$recorder" "$out" < postinst >> "$support/alternatives"
    fi
done

# What the postinst of ca-certificates makes: all authorities in one file, each with an end of line.
if [ -d "$out/usr/share/ca-certificates/mozilla" ]; then
    mkdir -p "$out/etc/ssl/certs"
    sed -s -e '$a\' "$out"/usr/share/ca-certificates/mozilla/*.crt > "$out/etc/ssl/certs/ca-certificates.crt"
fi
