# Unpacks .debs into one output; the builder of debian.nix, in Nix's sandbox.
#   $debs     the .deb files
#   $needed   the outputs of the units that these depend on
#   $recorder record_alternatives.sh
#   $out      the output: what stands at / in an image, and beside it nix-support/ with what Chandlery must know
#
# A .deb is not trusted: nothing here writes through a link that a .deb has brought. nix-support/ is made when all
# is unpacked, so that it holds what this script writes and nothing else.
set -euo pipefail
export PATH=/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C
umask 022

refuse() {
    printf 'refused: %s: %s\n' "$(basename "$deb")" "$1" >&2
    exit 1
}

mkdir "$out" support
echo root > support/image-layout
# Nix finds references by looking for their hashes in an output; this is where it finds these.
printf '%s\n' $needed > support/references

# /usr is merged, as Debian has it since bookworm: what a .deb has in /bin belongs in /usr/bin.
merged='bin\|sbin\|lib\|lib32\|lib64\|libx32\|libo32'
merge_usr="flags=rh;s,^\./\($merged\)\(/.*\)\?\$,./usr/\1\2,"

for deb in $debs; do
    dpkg-deb --fsys-tarfile "$deb" > data.tar
    # One path a line, as it will stand in the output; a line break in a name is shown as \n.
    tar --list --file data.tar --quoting-style=escape --show-transformed-names --transform "$merge_usr" > paths
    # The links of a merged /usr, which base-files has since trixie, are made for every image.
    tar --list --verbose --file data.tar --quoting-style=escape |
        sed -n "s,^l.* \(\./\($merged\)\) -> .*,\1,p" > merged-links
    ! grep -q '^\./nix-support\(/\|$\)' paths || refuse 'it has files in /nix-support, which is for what Chandlery must know'
    # Of this .deb: its own links, and to what its hard links lead. Names may have the words in them that stand
    # before a target, so every way to read a line counts.
    tar --list --verbose --file data.tar --quoting-style=escape | MERGED="$merged" perl -ne '
        BEGIN { ($merged = $ENV{MERGED}) =~ s{\\}{}g; open $links, ">", "links"; open $targets, ">", "targets" }
        chomp;
        my ($type, $rest) = m{^([lh])\S+ +\S+ +\d+ +\S+ +\S+ (.*)$} or next;
        my ($words, @parts) = $type eq "l" ? (" -> ") : (" link to ");
        @parts = split m{\Q$words\E}, $rest, -1;
        for my $cut (1 .. $#parts) {
            my $path = $type eq "l" ? join $words, @parts[0 .. $cut - 1] : join $words, @parts[$cut .. $#parts];
            next if $type eq "l" && $path =~ m{^\./($merged)$};
            $path =~ s{^\./($merged)(/.*)?$}{"./usr/$1" . ($2 // "")}e;
            print { $type eq "l" ? $links : $targets } "$path\n";
        }
    '
    # tar follows links: those that an earlier .deb has brought, as a package may stand in a folder that another
    # links to, and its own.
    perl -ne '
        BEGIN { open my $links, "<", "links"; chomp(my @links = <$links>); $own{$_} = 1 for @links }
        chomp;
        for (my $above = $_; $above =~ s{/[^/]*$}{};) { die "$_ lies behind a link of its own\n" if $own{$above} }
        s{\\([0-7]{3}|.)}{ length $1 == 3 ? chr oct $1 : { n => "\n", t => "\t", b => "\b", f => "\f", r => "\r", a => "\a", v => "\013" }->{$1} // $1 }ge;
        my @parts = grep { length && $_ ne "." } split m{/};
        die "it has the path $_\n" if grep { $_ eq ".." } @parts;
        my $left = 40;
        my @at;
        pop @parts if @parts && !m{/$};
        while (@parts) {
            my $part = shift @parts;
            if ($part eq "..") { die "a link leads out of the package at $_\n" unless @at; pop @at; next }
            next if $part eq "" || $part eq ".";
            my $path = join "/", $ENV{out}, @at, $part;
            if (-l $path) {
                my $target = readlink $path;
                die "$_ lies behind links without end\n" unless $left--;
                die "$_ lies behind a link to $target\n" if $target =~ m{^/};
                unshift @parts, split m{/}, $target;
                next;
            }
            push @at, $part;
        }
    ' paths targets 2> reason || refuse "$(cat reason)"
    # A Nix store has no device files, and a container gets its own /dev.
    tar --extract --file data.tar --directory "$out" --no-same-owner --no-same-permissions --delay-directory-restore \
        --keep-directory-symlink --no-wildcards --anchored --exclude-from merged-links \
        --wildcards --exclude './dev/*' --transform "$merge_usr"
    # A Nix store keeps one bit of a file's mode and no owner; what a .deb says beyond that is kept aside.
    tar --list --verbose --file data.tar --numeric-owner --quoting-style=literal \
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
        ' >> support/permissions
    # What it says of other packages that may have the same paths; a paragraph for each .deb.
    dpkg-deb --field "$deb" Package Version Provides Conflicts Replaces >> support/relations
    echo >> support/relations
    dpkg-deb --ctrl-tarfile "$deb" > control.tar
    if tar --extract --to-stdout --file control.tar ./postinst > postinst 2> missing; then
        bash "$recorder" "$out" < postinst >> support/alternatives
    fi
done

# What the postinst of ca-certificates makes: all authorities in one file, each with an end of line.
authorities=usr/share/ca-certificates/mozilla
leads_elsewhere() {
    local path=$out part
    for part in ${1//\// }; do
        path=$path/$part
        [ ! -L "$path" ] || return 0
    done
    return 1
}
if [ -d "$out/$authorities" ] && ! leads_elsewhere "$authorities" && ! leads_elsewhere etc/ssl/certs; then
    find "$out/$authorities" -maxdepth 1 -type f -name '*.crt' -print0 | sort --zero-terminated |
        xargs --null --no-run-if-empty sed -s -e '$a\' > bundle
    mkdir --parents "$out/etc/ssl/certs"
    # In place of a link, if there is one, and not through it.
    mv --no-target-directory bundle "$out/etc/ssl/certs/ca-certificates.crt"
fi

mkdir "$out/nix-support"
mv support/* "$out/nix-support/"
