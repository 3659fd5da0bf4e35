"""An operator and a feed-forward that the package does not have: four places make them work everywhere.

The places, each marked below: the modules with what a state is, a row of each table, their plain float64 form, and a
pattern that has them. Nothing else knows of them; what is forgotten raises.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from helpers import Net, documents, optimizer_for, rel_err, tokens_like

from lfm_jax import LFM
from lfm_jax import state as state_lib
from lfm_jax.ablate.cost import full_state
from lfm_jax.ablate.pattern import parse_pattern, to_letters
from lfm_jax.ablate.points import all_settings, make_trial, points
from lfm_jax.ablate.study import Grid, Study
from lfm_jax.ablate.tasks.recall import Mqar
from lfm_jax.config import ModelConfig
from lfm_jax.convert.families import config_to_hf
from lfm_jax.data.config import DataConfig
from lfm_jax.feed_forward.swiglu import SwiGLU
from lfm_jax.infer.generate import generate_tokens
from lfm_jax.kernels.linear import linear
from lfm_jax.kernels.sharded import causal_conv
from lfm_jax.kinds import FEED_FORWARDS, OPERATORS, FeedForwardKind, Kept, OperatorKind
from lfm_jax.layers import OUT_IN, normal_param
from lfm_jax.model import param_traits
from lfm_jax.plan import PlanConfig, budget, plan
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.recipe import load_recipe
from lfm_jax.sharding import MeshConfig
from lfm_jax.stacking import stack_layers
from lfm_jax.testing import tiny_config
from lfm_jax.train.loss import cross_entropy
from lfm_jax.train.optimizer import OptimizerConfig
from lfm_jax.train.state import unstacked

# ------------------------------------------------------------ place 1: the modules, and what the operator's state is

LOSS = 0.1
"""Weight of the loss of `Relu2`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Last(state_lib.LayerState):
    """The last token's input, after those that a rollback brings back."""

    x_BVD: jax.Array

    @classmethod
    def init(cls, config, batch, max_len, dtype, rollback):
        return cls(state_lib.zeros((batch, 1 + rollback, config.hidden_size), dtype, (None, None, "channels")))

    def reset(self, rows_B):
        return Last(jnp.where(rows_B[:, None, None], 0, self.x_BVD))

    def rollback(self, back_B):
        index_BV = jnp.maximum(jnp.arange(self.x_BVD.shape[1]) - back_B[:, None], 0)
        return Last(jnp.take_along_axis(self.x_BVD, index_BV[:, :, None], axis=1))

    def snapshot(self, row, start, length):
        return state_lib.row_of(self, row)

    def restore(self, row, start, part):
        return state_lib.with_row(self, row, part)

    def at_context(self, context):
        return self


class Shift(nnx.Module):
    """`out_proj(taps[1] x_t + taps[0] x_{t-1})`."""

    def __init__(self, config, *, rngs):
        D = config.hidden_size
        self.taps = normal_param(rngs, (2, D), (None, "channels"), config, decay=False, matrix=None, fan_in=2)
        self.out_proj = normal_param(
            rngs, (D, D), ("width", "channels"), config, decay=True, matrix=OUT_IN, fan_in=D, residual=True
        )

    def __call__(self, x_BTD, *, positions_BT, segment_ids_BT, state):
        last_B1D = None if state is None else state.x_BVD[:, -1:]
        y_BTD = causal_conv(x_BTD, self.taps[...].astype(x_BTD.dtype), last_B1D, segment_ids_BT)
        if state is not None:
            V, (B, T) = state.x_BVD.shape[1], x_BTD.shape[:2]
            ids_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
            all_BSD = jnp.concatenate([state.x_BVD, x_BTD.astype(state.x_BVD.dtype)], axis=1)
            index_BV = state_lib.lengths(ids_BT)[:, None] + jnp.arange(V)
            state = Last(jnp.take_along_axis(all_BSD, index_BV[:, :, None], axis=1))
        return linear(y_BTD, self.out_proj[...]), state


class Relu2(nnx.Module):
    """`down relu(up x)^2`, whose loss keeps the hidden layer small."""

    def __init__(self, config, *, rngs):
        D, F = config.hidden_size, config.ffn_size
        self.up = normal_param(rngs, (F, D), ("ffn", "width"), config, decay=True, matrix=OUT_IN, fan_in=D)
        self.down = normal_param(
            rngs, (D, F), ("width", "ffn"), config, decay=True, matrix=OUT_IN, fan_in=F, residual=True
        )

    def __call__(self, x_BTD, *, segment_ids_BT):
        h_BTF = jax.nn.relu(linear(x_BTD, self.up[...]))
        h32_BTF = h_BTF.astype(jnp.float32)
        halves_BT2 = jnp.stack([jnp.sum(x, axis=-1) for x in jnp.split(h32_BTF, 2, axis=-1)], axis=-1)
        reports = {"loss": LOSS * jnp.mean(h32_BTF**2, axis=-1), "active": jnp.mean(h32_BTF > 0, axis=-1),
                   "halves": halves_BT2}
        return linear(h_BTF**2, self.down[...]), reports


# --------------------------------------------------------------------------------------- place 2: a row of each table

SHIFT = OperatorKind(
    name="shift",
    module=Shift,
    params=lambda c: c.hidden_size**2 + 2 * c.hidden_size,
    matrices=lambda c: c.hidden_size**2,
    products=lambda c: c.hidden_size**2,
    kept=lambda c, share: Kept(0.0, c.hidden_size / share.tensor, c.hidden_size / share.tensor),
    mixing=lambda c, T: 2 * c.hidden_size,
    traded=lambda c: 0.0,
    state=Last,
    state_bytes=lambda c, T, item: c.hidden_size * item,
    rolls_back=True,
    letter="h",
    forms={"shift": {}},
)
RELU2 = FeedForwardKind(
    name="relu2",
    module=Relu2,
    width="ffn_size",
    params=lambda c: 2 * c.hidden_size * c.ffn_size,
    matrices=lambda c: 2 * c.hidden_size * c.ffn_size,
    products=lambda c: 2 * c.hidden_size * c.ffn_size,
    kept=lambda c, share: Kept(c.ffn_size / share.tensor, c.ffn_size / share.tensor, 3 * c.ffn_size / share.tensor),
    last_product=lambda c: c.hidden_size * c.ffn_size,
    buffers={},
)

# --------------------------------------------------------------------------------- place 3: their plain float64 form


def plain_shift(p, x_TD, positions_T, config):
    return reference.causal_conv(x_TD, p["taps"]) @ p["out_proj"].T


def plain_relu2(p, x_TD, config):
    return np.maximum(x_TD @ p["up"].T, 0) ** 2 @ p["down"].T


@pytest.fixture(scope="module", autouse=True)
def _registered():
    OPERATORS.register(SHIFT)
    FEED_FORWARDS.register(RELU2)
    reference.OPERATORS["shift"], reference.FEED_FORWARDS["relu2"] = plain_shift, plain_relu2
    yield
    OPERATORS.remove("shift")
    FEED_FORWARDS.remove("relu2")
    del reference.OPERATORS["shift"], reference.FEED_FORWARDS["relu2"]


# ------------------------------------------------------------------------------------ place 4: a pattern that has them

LAYERS = dict(
    layer_types=("shift", "full_attention", "shift", "full_attention", "conv"),
    ffn_types=("relu2", "swiglu", "relu2", "swiglu", "relu2"),
)


@pytest.fixture(scope="module")
def model():
    return Net(**LAYERS)


# ------------------------------------------------------------------------------------------------ what then works


def test_counts_are_those_of_what_is_there():
    config = tiny_config(**LAYERS)
    weights = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: LFM(config, rngs=nnx.Rngs(0))), nnx.Param))
    assert config.num_params() == sum(x.size for x in weights)
    state = jax.eval_shape(lambda: state_lib.init_state(config, 1, 9))
    assert config.state_bytes(9) == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert config.cannot_roll_back == ()


PACKED = np.asarray([[3, 3, 0, 1, 1, 1, 2, 0], [0, 0, 4, 4, 4, 4, 4, 4]], np.int32)


def test_packed_rows_hold_documents_apart(model):
    tokens = tokens_like(PACKED.shape, 0)
    hidden, _ = model(tokens, segment_ids=PACKED)
    for row in range(2):
        for where in documents(PACKED[row]):
            assert rel_err(hidden[row, where], model.reference(tokens[row, where])) < 1e-5


def test_chunks_and_single_tokens_are_the_whole(model):
    """Documents over calls of 4, 4, 1 and 1 tokens, with padding; one begins within a call."""
    tokens = tokens_like((2, 8), 1)
    ids = np.asarray([[1, 1, 1, 0, 1, 1, 2, 2], [1, 0, 1, 1, 0, 0, 0, 0]], np.int32)
    state, parts = model.init_state(2, 16), []
    for start in (0, 4):
        chunk = slice(start, start + 4)
        hidden, state = model(tokens[:, chunk], segment_ids=ids[:, chunk], state=state)
        parts.append(hidden)
    going_on = tokens_like((2, 2), 2)
    for i in range(2):
        hidden, state = model(going_on[:, i : i + 1], state=state)
        parts.append(hidden)
    hidden = np.concatenate(parts, axis=1)
    for row, first, second in ((0, [0, 1, 2, 4, 5], [6, 7, 8, 9]), (1, [0, 2, 3, 8, 9], [])):
        stream = np.concatenate([tokens[row], going_on[row]])
        for where in filter(None, (first, second)):
            assert rel_err(hidden[row, where], model.reference(stream[where])) < 1e-5


def test_states_go_back_and_are_put_together_from_snapshots(model):
    config, tokens = model.config, tokens_like((2, 8), 3)
    state = state_lib.init_state(config, 2, 16, rollback=2)
    _, state = model(tokens[:, :4], state=state)
    back = state_lib.rollback(state, jnp.asarray([2, 0], jnp.int32))
    hidden, _ = model(tokens[:, 4:5], state=back)
    assert rel_err(hidden[0], model.reference(tokens[0, [0, 1, 4]])[-1:]) < 1e-5
    assert rel_err(hidden[1], model.reference(tokens[1, :5])[-1:]) < 1e-5

    parts = [state_lib.snapshot(state, jnp.int32(1), jnp.int32(0), 4)]
    _, state = model(tokens[:, 4:], state=state)
    parts.append(state_lib.snapshot(state, jnp.int32(1), jnp.int32(4), 4))
    other = state_lib.reset(state, jnp.asarray([True, False]))
    for start, part in zip((0, 4), parts, strict=True):
        other = state_lib.restore(other, jnp.int32(0), jnp.int32(start), part)
    hidden, _ = model(tokens[:, :1], state=other)
    assert rel_err(hidden[0], model.reference(np.append(tokens[1], tokens[0, 0]))[-1:]) < 1e-5
    assert full_state(config, 8, room=4).position_B.tolist() == [8]  # What ablations time.


def test_generated_tokens_are_the_likeliest(model):
    network = nnx.merge(model.graphdef, model.params)
    prompt = tokens_like((5,), 4).tolist()
    [made] = generate_tokens(network, [prompt], max_new_tokens=4, stop_ids=())
    tokens = list(prompt)
    for token in made.tokens:
        logits_V = model.reference(np.asarray(tokens))[-1] @ model.params64["embed"].T
        assert token == np.argmax(logits_V)
        tokens.append(token)


BATCH = dict(
    tokens=tokens_like((2, 12), 5), targets=tokens_like((2, 12), 6),
    segment_ids=np.asarray([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], np.int32),
    positions=np.asarray([[*range(5), *range(7)], range(12)], np.int32),
)
MUON = OptimizerConfig(peak_lr=1e-2, warmup_steps=0, schedule="constant", eps=1e-3, algorithm="muon", clip_norm=1e9)


@pytest.fixture(scope="module")
def one_pass(model):
    """(gradient of loss over targets and of the layers' losses over tokens, Aux), each by hand."""

    @jax.jit
    def run(params):
        def total(params):
            network = nnx.merge(model.graphdef, params)
            hidden_BTD, aux = network.hidden(BATCH["tokens"], BATCH["positions"], BATCH["segment_ids"])
            loss = cross_entropy(hidden_BTD, network.head_VD, BATCH["targets"], chunk=8, z_loss=0.0)
            return loss.total / 24 + jnp.sum(aux.reports["relu2/loss"]) / 21, aux

        return jax.grad(total, has_aux=True)(params)

    return run(model.params)


def test_reports_are_sums_over_real_tokens_by_layer(model, one_pass):
    _, aux = one_pass
    sums = {name: np.zeros((3, *shape)) for name, shape in (("loss", ()), ("active", ()), ("halves", (2,)))}
    where = iter(range(9))  # Documents by documents, the layers that have reports.

    def reporting(p, x_TD, config):
        h_TF = np.maximum(x_TD @ p["up"].T, 0)
        layer = next(where) % 3
        sums["loss"][layer] += LOSS * np.sum(np.mean(h_TF**2, axis=-1))
        sums["active"][layer] += np.sum(np.mean(h_TF > 0, axis=-1))
        sums["halves"][layer] += [np.sum(half) for half in np.split(h_TF, 2, axis=-1)]
        return plain_relu2(p, x_TD, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference.FEED_FORWARDS, "relu2", reporting)
        for tokens, ids in zip(BATCH["tokens"], BATCH["segment_ids"], strict=True):
            for document in documents(ids):
                model.reference(tokens[document])
    assert set(aux.reports) == {"relu2/loss", "relu2/active", "relu2/halves"}
    for name, value in sums.items():
        assert rel_err(aux.reports[f"relu2/{name}"], value) < 1e-5
    assert set(aux.squares) == {"shift", "full_attention", "conv", "feed_forward"}


def test_training_lowers_the_loss_and_stacked_layers_are_the_same(model, one_pass):
    results = []
    for scan in (False, True):
        config = model.config.replace(scan_layers=scan, remat="full" if scan else "ffn")
        training = next_token_training(
            config, optimizer_for(config, MUON), loss_chunk=8, micro_batches=2 if scan else 1
        )
        state, step = training.placed_state(jax.tree.map(np.asarray, model.params)), training.compiled_step()
        found = []
        for _ in range(3):
            state, metrics = step(state, BATCH)
            found.append({name: float(x) for name, x in metrics.items()})
        results.append((found, unstacked(state, config).params))
    assert len(stack_layers(model.params, model.config)["blocks"]) == 3
    (found, params), (scanned, scanned_params) = results
    assert found[2]["loss"] < found[0]["loss"]
    assert found[2]["relu2/loss"] < found[0]["relu2/loss"]
    assert {"act_norm/shift", "grad_norm/shift", "relu2/active"} <= found[0].keys()
    grads, aux = one_pass
    by_hand = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads)))
    assert found[0]["grad_norm"] == pytest.approx(by_hand, rel=1e-5)
    assert found[0]["relu2/active"] == pytest.approx(float(jnp.mean(aux.reports["relu2/active"])) / 21, rel=1e-5)
    for one, other in zip(found, scanned, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(scanned_params), strict=True):
        assert rel_err(b, a) < 1e-3  # Newton-Schulz enlarges what rounding left.


def test_plans_count_them():
    data = DataConfig(sources=("text",), seq_len=64, batch_size=16)
    sizes = dict(vocab_size=512, hidden_size=64, ffn_size=128, num_heads=8, num_kv_heads=4, head_dim=16)
    found = {}
    for ffn in ("swiglu", "relu2"):
        config = PlanConfig(run_dir="runs/x", steps=1000, topology="gpu:8xH200", data=data, mesh=MeshConfig(fsdp=4),
                            model=ModelConfig(layer_types=("shift", "full_attention"), ffn_types=(ffn,), **sizes))
        found[ffn] = budget(config, None)
        assert found[ffn].parameters == 4 * config.model.num_params()
        assert found[ffn].model_flops == 3 * config.model.flops_per_token(64) * 16 * 64
    # In each of two layers a product less, its weights and its results, which are kept in bfloat16.
    assert found["swiglu"].model_flops - found["relu2"].model_flops == 3 * 2 * 2 * 64 * 128 * 16 * 64
    assert found["swiglu"].activations - found["relu2"].activations == 2 * 2 * (16 * 64 * 128 + 64 * 128)
    assert "all-gather" in str(plan(config))


def test_recipes_and_flags_name_them(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "run_dir: runs/x\nsteps: 1000\ndata: {sources: [text], seq_len: 8, batch_size: 1}\n"
        "model: {layer_types: [shift, full_attention]}\n"
    )
    config = load_recipe(TrainConfig, tmp_path / "recipe.yaml", ["--model.ffn-types", "relu2", "swiglu"]).model
    assert config.layers == (("shift", "relu2"), ("full_attention", "swiglu"))
    with pytest.raises(ValueError, match=r"no shift layers, ffn_types=relu2"):
        config_to_hf(config)


def test_ablations_read_their_letter_and_vary_them():
    assert parse_pattern("hahc") == ("shift", "full_attention", "shift", "conv")
    assert to_letters(parse_pattern("shift:2,attention:1,place:back")) == "hha"
    study = Study(
        name="tiny", question="?", out="runs", pattern="conv:3,attention:1", tasks=("mqar",), match_step=2, seeds=2,
        vary=(Grid.of({"operator": ["shift", "rglru"]}),), mqar=Mqar(pairs=(2,), length=16, steps=3, batch_size=4),
        model=tiny_config(ffn_types=("relu2",), hidden_size=32, ffn_size=64), cost_contexts=(),
    )
    base, shift, _ = points(study)
    assert to_letters(shift.model.layer_types) == "hhah"
    assert all_settings(study, shift) == {"operator": "shift"}
    trial = make_trial(study, shift, base, "mqar", study.mqar)
    assert trial.model.ffn_size > 64  # A shift has fewer parameters than a convolution.
    assert abs(trial.match_off) <= 0.01


def test_another_kind_of_the_same_name_has_traits_of_its_own():
    class Undecayed(nnx.Module):
        def __init__(self, config, *, rngs):
            self.up = normal_param(rngs, (3, 2), (None, "ffn"), config, decay=False, matrix=None)

    found = []
    for module in (Relu2, Undecayed):
        FEED_FORWARDS.register(dataclasses.replace(RELU2, name="other", module=module))
        config = tiny_config(layer_types=("conv",), ffn_types=("other",))
        found.append(param_traits(config)["blocks"][0]["feed_forward"])
        assert param_traits(config)["blocks"][0]["feed_forward"] is found[-1]  # Made once.
        FEED_FORWARDS.remove("other")
    assert [sorted(traits) for traits in found] == [["down", "up"], ["up"]]
    assert [(traits["up"].axes, traits["up"].decay) for traits in found] == [
        (("ffn", "width"), True), ((None, "ffn"), False),
    ]


# ------------------------------------------------------------------------------------------------ what is forgotten


def fields_of(kind, leave_out=None):
    return {field.name: getattr(kind, field.name) for field in dataclasses.fields(kind) if field.name != leave_out}


@pytest.mark.parametrize(
    ("kind", "field"),
    [(kind, field.name) for kind in (SHIFT, RELU2) for field in dataclasses.fields(kind)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_row_without_a_field_is_refused(kind, field):
    with pytest.raises(TypeError, match=f"argument: '{field}'"):
        type(kind)(**fields_of(kind, leave_out=field))
    table = OPERATORS if kind is SHIFT else FEED_FORWARDS
    with pytest.raises(ValueError, match=rf"  - {field} is None; every field"):
        table.register(dataclasses.replace(kind, **{"name": "other", field: None}))
    assert list(table) == [*list(table)[:-1], kind.name]


def test_what_is_taken_is_refused_and_what_is_unknown_named():
    with pytest.raises(ValueError, match=r"name 'shift' is taken(.|\n)*letter 'h' is that of shift(.|\n)*form 'shift'"):
        OPERATORS.register(SHIFT)
    with pytest.raises(ValueError, match="letter is 'hh'; it must be one letter"):
        OPERATORS.register(dataclasses.replace(SHIFT, name="other", letter="hh", forms={}))
    with pytest.raises(ValueError, match=r"'mamba' is not a known operator; choose from conv, .*, shift"):
        OPERATORS["mamba"]
    with pytest.raises(ValueError, match="ffn_types has sparse; choose from swiglu, moe, relu2"):
        tiny_config(ffn_types=("sparse",))
    with pytest.raises(ValueError, match="ffn_types has 2 entries, layer_types 3"):
        tiny_config(ffn_types=("swiglu", "relu2"))


@pytest.mark.parametrize("method", sorted(state_lib.LayerState.__abstractmethods__))
def test_a_state_without_a_method_is_refused(method, monkeypatch):
    members = {name: value for name, value in vars(Last).items() if name not in (method, "__dict__", "__weakref__")}
    lacking = type("Lacking", (state_lib.LayerState,), members)
    with pytest.raises(TypeError, match=f"state Lacking of operator 'other' lacks {method}"):
        init_with(monkeypatch, state=lacking)


def test_a_state_that_says_another_thing_of_rollbacks_is_refused(monkeypatch):
    with pytest.raises(TypeError, match="has rollback, but the kind's rolls_back is False"):
        init_with(monkeypatch, rolls_back=False)
    stuck = type("Stuck", (Last,), {"rollback": state_lib.LayerState.rollback})
    with pytest.raises(TypeError, match="state Stuck of operator 'other' lacks rollback"):
        init_with(monkeypatch, state=stuck)
    with pytest.raises(TypeError, match=r"is not a subclass of state\.LayerState"):
        init_with(monkeypatch, state=dict)


def init_with(monkeypatch, **changes):
    """An empty state of a layer that is a `shift` but for some fields."""
    monkeypatch.setitem(OPERATORS._kinds, "other", dataclasses.replace(SHIFT, name="other", **changes))
    return state_lib.init_state(tiny_config(layer_types=("other",)), 1, 4)


class NoState(Shift):
    def __call__(self, x_BTD, **how):
        return super().__call__(x_BTD, **how)[0], None


class NoPair(Shift):
    def __call__(self, x_BTD, **how):
        return super().__call__(x_BTD, **how)[0]


class Narrow(Shift):
    def __call__(self, x_BTD, **how):
        y_BTD, state = super().__call__(x_BTD, **how)
        return y_BTD[:, :, :1], state


class NoReports(SwiGLU):
    def __call__(self, x_BTD, **how):
        return super().__call__(x_BTD, **how)[0]


class Summed(SwiGLU):
    def __call__(self, x_BTD, **how):
        y_BTD, _ = super().__call__(x_BTD, **how)
        return y_BTD, {"size": jnp.sum(y_BTD.astype(jnp.float32))}


class HalfPrecision(SwiGLU):
    def __call__(self, x_BTD, **how):
        y_BTD, _ = super().__call__(x_BTD, **how)
        return y_BTD, {"size": jnp.mean(y_BTD, axis=-1).astype(jnp.bfloat16)}


@pytest.mark.parametrize(("module", "says"), [
    (NoState, "operator 'other' returns NoneType as its state; Last came in"),
    (NoPair, r"operator 'other' returns .*Tracer; expected a tuple \(y_BTD, state\)"),
    (Narrow, r"operator 'other' returns y_BTD of shape \(2, 2, 1\); expected \(2, 2, 32\)"),
    (NoReports, r"feed-forward 'other' returns .*Tracer; expected a tuple \(y_BTD, reports\)"),
    (Summed, r"feed-forward 'other' reports size as float32\[\]; expected float32 with a value for each token"),
    (HalfPrecision, r"feed-forward 'other' reports size as bfloat16\[2, 2\]; expected float32"),
])
def test_a_module_that_returns_another_thing_is_refused(module, says, monkeypatch):
    feed_forward = issubclass(module, SwiGLU)
    table, kind = (FEED_FORWARDS, RELU2) if feed_forward else (OPERATORS, SHIFT)
    monkeypatch.setitem(table._kinds, "other", dataclasses.replace(kind, name="other", module=module))
    config = tiny_config(layer_types=("shift",) if feed_forward else ("other",),
                         ffn_types=("other",) if feed_forward else ("swiglu",))

    def run():
        network, tokens = LFM(config, rngs=nnx.Rngs(0)), jnp.ones((2, 2), jnp.int32)
        if feed_forward:
            return network.hidden(tokens, None, None)
        return network(tokens, state=network.init_state(2, 4))

    with pytest.raises(TypeError, match=says):
        jax.eval_shape(run)


def test_a_parameter_without_traits_is_refused():
    with pytest.raises(TypeError, match="'decay' and 'matrix'"):
        normal_param(nnx.Rngs(0), (2,), (None,), tiny_config())
