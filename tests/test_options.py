from pathlib import Path

import platformdirs
import pytest

from runner.options import Options, configured, state_dir


def test_the_state_folder_is_where_the_platform_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_RUN_STATE_DIR", raising=False)
    for base in ("", " ", str(tmp_path)):
        monkeypatch.setenv("XDG_STATE_HOME", base)
        assert state_dir() == platformdirs.user_state_path("mlx-run", appauthor=False)
    monkeypatch.setenv("MLX_RUN_STATE_DIR", "here")
    assert state_dir() == Path("here").absolute()


def test_what_needs_settings_to_be_read() -> None:
    assert not configured({"MLX_RUN_STATE_DIR": "x", "HOME": "y"})
    assert configured({"MLX_RUN_LOG_LEVEL": "debug"})
    assert Options(Path("x")).drain_timeout == 30
