# SPDX-License-Identifier: Apache-2.0
"""Files are replaced as a whole, or stay as they were."""

import os

import pytest

from vssm.models.files import leftovers, replacing, state_of


def test_replacing_writes_a_whole_file(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    path.chmod(0o600)
    with replacing(path) as temporary:
        temporary.write_text('new')
        temporary.chmod(0o600)
        assert path.read_text() == 'old' and list(tmp_path.glob('.*.tmp')) == [temporary]
    assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]
    os.umask(umask := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_replacing_takes_permissions_of_another_file(tmp_path):
    like, path = tmp_path / 'like', tmp_path / 'file'
    like.touch(0o640)
    with replacing(str(path), like=like) as temporary:
        temporary.touch()
    assert path.stat().st_mode == like.stat().st_mode


def test_replacing_leaves_the_old_file_after_an_error(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text('half')
        1 / 0  # noqa: B018
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_replacing_needs_something_written(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / 'file'):
        pass
    with pytest.raises(FileNotFoundError), replacing(tmp_path / 'none' / 'file') as temporary:
        temporary.touch()


def test_leftovers_are_temporary_files_of_one_writer_alone(tmp_path):
    for name in ('.file.0123456789abcdef.tmp', '.file.b.0123456789abcdef.tmp', '.file.ba.0123456789abcdef.tmp'):
        (tmp_path / name).touch()
    for name in ('file', '.file', '.file.a.tmp', '.file.a.12.tmp', 'file.a.0123456789abcdef.tmp'):
        (tmp_path / name).touch()
    with replacing(tmp_path / 'file', owner='a') as temporary:
        temporary.touch()
        assert leftovers(tmp_path, 'a') == [temporary]
    assert leftovers(tmp_path, 'a') == [] and len(leftovers(tmp_path, 'b')) == 1


def test_the_state_of_a_path(tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'broken').symlink_to('nothing')
    os.mkfifo(tmp_path / 'pipe')
    said = {name: state_of(tmp_path / name) for name in ('.', 'file', 'broken', 'pipe', 'absent')}
    assert said == {
        '.': 'is a folder',
        'file': 'is a file',
        'broken': 'is a link to what does not exist',
        'pipe': 'is neither a file nor a folder',
        'absent': 'does not exist',
    }
