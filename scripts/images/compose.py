#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Puts images together: from root file systems as tar archives to an archive that is both docker-archive and OCI.

  compose.py busybox PROGRAM OUT                           a root file system of busybox and its applets
  compose.py image NAME CONFIG ROOTFS OUT [--base ROOTFS]  an image; with --base, what ROOTFS has more becomes a second layer
"""

import copy
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile

EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
CREATED = "2023-11-14T22:13:20Z"


def member(name, kind=tarfile.REGTYPE, mode=0o644, **fields):
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime = kind, mode, EPOCH
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def add_file(archive, name, data, mode=0o644):
    archive.addfile(member(name, mode=mode, size=len(data)), io.BytesIO(data))


def busybox(program, out):
    applets = subprocess.run([program, "--list-full"], check=True, capture_output=True, text=True).stdout.split()
    with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as archive:
        modes = {"tmp": 0o1777, "root": 0o700, "var/tmp": 0o1777}
        for name in ("bin dev etc home proc root sbin sys tmp usr usr/bin usr/sbin var var/log var/spool var/tmp var/www").split():
            archive.addfile(member(name, tarfile.DIRTYPE, modes.get(name, 0o755)))
        with open(program, "rb") as file:
            add_file(archive, "bin/busybox", file.read(), 0o755)
        for applet in sorted(set(applets) - {"bin/busybox"}):
            archive.addfile(member(applet, tarfile.LNKTYPE, 0o755, linkname="bin/busybox"))
        add_file(archive, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n")
        add_file(archive, "etc/group", b"root:x:0:\ntty:x:5:\nnobody:x:65534:\n")
        add_file(archive, "etc/nsswitch.conf", b"hosts: files dns\n")


def normal(name):
    return name.strip("/").removeprefix("./").strip("/")


def entries(path):
    """Name -> (what an entry is, its header), and the data's digest in it."""
    found = {}
    with tarfile.open(path) as archive:
        for info in archive:
            name = normal(info.name)
            digest = hashlib.sha256(archive.extractfile(info).read()).hexdigest() if info.isreg() else ""
            link = normal(info.linkname) if info.islnk() else info.linkname
            extra = {key: value for key, value in info.pax_headers.items() if key.startswith("SCHILY.xattr.")}
            identity = (info.type, info.mode, info.uid, info.gid, min(int(info.mtime), EPOCH), link,
                        info.devmajor, info.devminor, digest, sorted(extra.items()))
            found[name] = (identity, extra)
    return found


def layer(path, base, out):
    """Writes what the archive has more than the base, in order of names; deleted names become whiteouts."""
    below = entries(base) if base else {}
    above = entries(path)
    changed = {name for name, (identity, _) in above.items() if name not in below or below[name][0] != identity}
    # A hard link and what it is a link to come together.
    with tarfile.open(path) as source:
        infos = {normal(info.name): info for info in source}
        for name in list(changed):
            if infos[name].islnk():
                changed.add(normal(infos[name].linkname))
        needed = set(changed)
        deleted = {name for name in below if name not in above}
        deleted = {name for name in deleted if os.path.dirname(name) not in deleted}
        for name in list(changed) + [os.path.dirname(name) for name in deleted]:
            while name:
                name = os.path.dirname(name)
                needed.add(name)
            needed.add("")
        needed |= {os.path.dirname(name) for name in deleted}
        with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as archive:
            # Links after what they lead to.
            for name in sorted(needed & set(infos), key=lambda name: (infos[name].islnk(), name)):
                info = copy.copy(infos[name])
                info.name, info.uname, info.gname = name or "./", "", ""
                info.mtime = min(int(info.mtime), EPOCH)
                info.pax_headers = dict(above[name][1])
                if info.islnk():
                    info.linkname = normal(info.linkname)
                archive.addfile(info, source.extractfile(info) if info.isreg() else None)
            for name in sorted(deleted):
                directory, last = os.path.split(name)
                add_file(archive, os.path.join(directory, ".wh." + last), b"", 0)


def image(name, config, rootfs, out, base):
    blobs, layers, diff_ids = {}, [], []

    def blob(data):
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"digest": "sha256:" + digest, "size": len(data)}

    for archive, below in ([(base, None)] if base else []) + [(rootfs, base)]:
        plain = out + ".layer"
        layer(archive, below, plain)
        with open(plain, "rb") as file:
            data = file.read()
        os.remove(plain)
        diff_ids.append("sha256:" + hashlib.sha256(data).hexdigest())
        packed = gzip.compress(data, 6, mtime=0)
        layers.append({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **blob(packed)})

    with open(config) as file:
        wanted = json.load(file)
    history = [{"created": CREATED, "created_by": "scripts/build-images debian"}] if base else []
    history.append({"created": CREATED, "created_by": "scripts/build-images " + name})
    configuration = {
        "architecture": "amd64", "os": "linux", "created": CREATED, "config": wanted,
        "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": history,
    }
    dump = lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    config_blob = blob(dump(configuration))
    manifest = blob(dump({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **config_blob}, "layers": layers,
    }))
    tag = name + ":latest"
    path = lambda descriptor: "blobs/sha256/" + descriptor["digest"].removeprefix("sha256:")
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as archive:
        add_file(archive, "oci-layout", dump({"imageLayoutVersion": "1.0.0"}))
        for digest, data in blobs.items():
            add_file(archive, "blobs/sha256/" + digest, data)
        add_file(archive, "manifest.json", dump([
            {"Config": path(config_blob), "RepoTags": [tag], "Layers": [path(descriptor) for descriptor in layers]}
        ]))
        add_file(archive, "index.json", dump({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json", **manifest,
                "platform": {"architecture": "amd64", "os": "linux"},
                "annotations": {
                    "io.containerd.image.name": "docker.io/library/" + tag, "org.opencontainers.image.ref.name": "latest",
                },
            }],
        }))


def main(arguments):
    match arguments:
        case ["busybox", program, out]:
            busybox(program, out)
        case ["image", name, config, rootfs, out]:
            image(name, config, rootfs, out, None)
        case ["image", name, config, rootfs, out, "--base", base]:
            image(name, config, rootfs, out, base)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
