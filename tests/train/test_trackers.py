"""Each tracker has every record once, whatever kills and resumes a run went through."""

import sys
import types

import pytest

from lfm_jax.train.metrics import read_metrics
from lfm_jax.train.trackers import check_trackers, open_trackers


def run_killed_at_5_and_resumed_from_3(names, run_dir):
    log = open_trackers(names, run_dir, {"steps": 6}, 0)
    for step in range(1, 6):
        log.log(step, {"loss": 10.0 - step, "grad_norm/conv": 0.5, "time": 1e9 + step})
    resumed = open_trackers(names, run_dir, {"steps": 6}, 3)  # The first is not closed: it was killed.
    for step in range(4, 7):
        resumed.log(step, {"loss": 10.0 - step, "grad_norm/conv": 0.5, "time": 1e9 + step})
    resumed.log(6, {"heldout_loss": 7.0, "mfu": None, "spike": float("nan"), "time": 1e9 + 6})
    resumed.close()


def test_jsonl_is_there_without_any_name_and_has_each_step_once(tmp_path):
    run_killed_at_5_and_resumed_from_3((), tmp_path)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6, 6]
    assert records[-1] == {"step": 6, "heldout_loss": 7.0, "mfu": None, "spike": None, "time": 1e9 + 6}


def test_a_rollback_drops_what_is_behind_it(tmp_path):
    log = open_trackers((), tmp_path, {}, 0)
    for step in range(1, 6):
        log.log(step, {"loss": 1.0})
    log.rewind(2)
    log.log(3, {"loss": 2.0})
    log.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def tensorboard_scalars(directory):
    """tag -> [(step, value)] as TensorBoard shows them: a START event takes back what lies at or behind its step."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = {}
    for path in sorted(directory.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, checksum, content, checksum.
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.session_log.status == SessionLog.START:
                found = {tag: [p for p in points if p[0] < event.step] for tag, points in found.items()}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_has_each_step_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboardX")
    run_killed_at_5_and_resumed_from_3(("tensorboard",), tmp_path)
    found = tensorboard_scalars(tmp_path / "tensorboard")
    assert found["loss"] == [(step, 10.0 - step) for step in range(1, 7)]
    assert [step for step, _ in found["grad_norm/conv"]] == [1, 2, 3, 4, 5, 6]
    assert found["heldout_loss"] == [(6, 7.0)]
    assert set(found) == {"loss", "grad_norm/conv", "heldout_loss"}


class FakeWandb(types.ModuleType):
    """Keeps rows by run id as the service does: a row is sent when the next step begins, and no step comes twice.

    Args:
      offline: a resumed run knows nothing of what went before.
    """

    def __init__(self, offline):
        super().__init__("wandb")
        self.offline, self.inits, self.rows, self.closed = offline, [], {}, 0

    def init(self, **options):
        assert options["resume"] == "allow"
        self.inits.append(options)
        rows = self.rows.setdefault(options["id"], {})
        if self.offline:
            rows.clear()
        pending = {}

        def send():
            rows.update(pending)
            pending.clear()

        def log(record, step):
            assert step > max(rows, default=-1), "a step that is there already"
            if step not in pending:
                send()
            pending.setdefault(step, {}).update(record)

        def finish():
            send()
            self.closed += 1

        return types.SimpleNamespace(log=log, finish=finish, starting_step=max(rows, default=-1) + 1)


@pytest.mark.parametrize("offline", [False, True])
def test_wandb_goes_on_with_the_same_run_and_gets_each_step_once(tmp_path, monkeypatch, offline):
    fake = FakeWandb(offline)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run_killed_at_5_and_resumed_from_3(("wandb",), tmp_path)
    assert fake.inits[0]["project"] == "mine"
    assert fake.inits[0]["config"] == {"steps": 6}
    (rows,) = fake.rows.values()
    assert {step: row["loss"] for step, row in rows.items()} == {s: 10.0 - s for s in range(1, 7)}
    assert rows[6] == {"loss": 4.0, "grad_norm/conv": 0.5, "heldout_loss": 7.0}
    assert fake.closed == 1


def test_wandb_gets_what_a_kill_kept_from_it(tmp_path, monkeypatch):
    fake = FakeWandb(offline=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = open_trackers(("wandb",), tmp_path, {}, 0)
    log.log(1, {"loss": 1.0})
    log.log(2, {"loss": 2.0})  # Never sent.
    open_trackers(("wandb",), tmp_path, {}, 2).close()
    (rows,) = fake.rows.values()
    assert {step: row["loss"] for step, row in rows.items()} == {1: 1.0, 2: 2.0}


class FakeTrackio(types.ModuleType):
    """A local store of runs by name; a second run of a name would be a second curve."""

    def __init__(self):
        super().__init__("trackio")
        self.stored = []

    def Api(self):
        def run(entry):
            return types.SimpleNamespace(name=entry["name"], delete=lambda: self.stored.remove(entry))

        def runs(project):
            found = [run(entry) for entry in self.stored if entry["project"] == project]
            if not found:
                raise ValueError(f"Project '{project}' does not exist")
            return found

        return types.SimpleNamespace(runs=runs)

    def init(self, *, project, name, config, embed):
        entry = {"project": project, "name": name, "points": []}
        self.stored.append(entry)
        return types.SimpleNamespace(
            log=lambda record, step: entry["points"].append((step, record)), finish=lambda: None
        )


def test_trackio_s_run_is_written_again_from_the_records(tmp_path, monkeypatch):
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    run_killed_at_5_and_resumed_from_3(("trackio",), tmp_path)
    (entry,) = fake.stored
    assert [(step, r["loss"]) for step, r in entry["points"] if "loss" in r] == [(s, 10.0 - s) for s in range(1, 7)]
    assert [step for step, r in entry["points"] if "heldout_loss" in r] == [6]


def test_a_tracker_that_is_not_known_or_not_installed_is_told_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"(?s)'wandb'.*pip install 'lfm_jax\[track\]'.*'mlflow'; choose from tensorb"):
        open_trackers(("wandb", "mlflow"), tmp_path, {}, 0)
    assert list(tmp_path.iterdir()) == []
    assert check_trackers(()) == []
