"""Prints all attributes of the files below a directory, a line each, but for the times of directories, which change with
what is put into them: snapshot_only.py DIRECTORY"""

import hashlib
import os
import stat
import sys

top = sys.argv[1]
for folder, folders, files in sorted(os.walk(top)):
    folders.sort()
    for name in sorted([".", *folders, *files]):
        path = os.path.join(folder, name)
        found = os.lstat(path)
        is_folder = stat.S_ISDIR(found.st_mode)
        what = [os.path.relpath(path, top), oct(found.st_mode), found.st_uid, found.st_gid]
        if not is_folder:
            what += [found.st_mtime_ns, found.st_nlink, found.st_size]
        what += [(key, os.getxattr(path, key, follow_symlinks=False)) for key in sorted(os.listxattr(path, follow_symlinks=False))]
        if stat.S_ISLNK(found.st_mode):
            what += [os.readlink(path)]
        if stat.S_ISREG(found.st_mode):
            with open(path, "rb") as file:
                what += [hashlib.sha256(file.read()).hexdigest()]
        print(*what)
