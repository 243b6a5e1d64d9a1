"""Files and folders that take the place of earlier ones, or leave them as they were."""

from pathlib import Path

import pytest

from mmcls_involution.weights.files import bring_back, check_checkpoint, put_in_place


@pytest.mark.parametrize('fails', [False, True])
def test_folder_is_replaced_or_kept(fails, tmp_path, monkeypatch):
    partial, target = tmp_path / '.a.partial', tmp_path / 'a'
    for folder, text in ((partial, 'new'), (target, 'old')):
        folder.mkdir()
        (folder / 'file').write_text(text)
    rename = Path.rename

    def move(self: Path, other: Path) -> Path:
        if fails and self == partial:
            raise OSError('no space left')
        return rename(self, other)

    monkeypatch.setattr(Path, 'rename', move)
    if fails:
        with pytest.raises(OSError, match='no space left'):
            put_in_place(partial, target)
    else:
        put_in_place(partial, target)
    assert (target / 'file').read_text() == ('old' if fails else 'new')
    left = {path.name for path in tmp_path.iterdir()} - {'.a.partial'}
    assert left == {'a'}
    assert partial.exists() == fails


class Killed(BaseException):
    """Ends a process, whatever it catches."""


def test_folder_left_aside_by_a_kill_is_found(tmp_path, monkeypatch):
    partial, target = tmp_path / '.a.b.pth.7.partial', tmp_path / 'a.b.pth'
    for folder, text in ((partial, 'new'), (target, 'old')):
        folder.mkdir()
        (folder / 'file').write_text(text)
    rename = Path.rename

    def move(self: Path, other: Path) -> Path:
        if self == partial:
            raise Killed
        return rename(self, other)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, 'rename', move)
        put_in_place(partial, target)
    assert not target.exists()
    check_checkpoint(str(target), '--resume')
    assert (target / 'file').read_text() == 'old'
    # The place of one whose replacement was given its name is taken.
    left = tmp_path / '.a.b.pth.8.partial.old'
    left.mkdir()
    bring_back(tmp_path)
    assert left.is_dir() and (target / 'file').read_text() == 'old'
