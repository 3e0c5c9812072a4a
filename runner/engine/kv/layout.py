"""How a model caches what it has seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from runner.engine.kv import prompt_kernel
from runner.engine.kv.caches import Caches, leaves_of
from runner.engine.kv.calls import Launch
from runner.engine.kv.foreign import Foreign
from runner.engine.kv.kept import Beginning
from runner.engine.kv.layers import Straight
from runner.engine.kv.planes import Form
from runner.engine.kv.positions import Positions
from runner.engine.kv.quantised import Quantisation, Quantised
from runner.engine.kv.quantised_kernel import PackedLaunch
from runner.engine.kv.recurrent import Recurrent
from runner.engine.kv.sizes import AS_NEEDED, FEW, Sizes
from runner.engine.kv.threshold import Threshold
from runner.engine.kv.thresholded import After, Before, Thresholded
from runner.engine.kv.window import Window


class Layout:
    """How a model caches what it has seen, read off the empty caches that upstream makes for it."""

    def __init__(
        self,
        model: Any,
        slack: int = 0,
        quantisation: Quantisation | None = None,
        understood: bool = True,
        launch: Launch | None = None,
        packed_launch: PackedLaunch | None = None,
        prompt_launch: Launch | None = None,
        *,
        rotates: bool = False,
    ) -> None:
        """`slack` is how many tokens can be cut off a row's end where the model has sliding windows.

        With a `quantisation`, layers that cache all tokens cache them so. A model that is not `understood` uses its
        caches in ways of its own. `launch` writes and attends for layers whose keys are as the model makes them,
        `packed_launch` for those that are quantised, `prompt_launch` for the former in wider calls. With `rotates`,
        they also rotate queries and keys, for models that let them (`rotary.install`).
        """
        self.quantisation = quantisation
        self.launch = launch
        self.packed_launch = packed_launch
        self.prompt_launch = prompt_launch
        self.rotates = rotates
        self._model = model
        self._slack = slack
        self._templates = self.upstream()
        self._forms: dict[int, Form] = {}
        leaves = leaves_of(self._templates)
        self.unknown = sorted({type(leaf).__name__ for leaf in leaves if not (understood and _known(leaf))})
        """Classes of upstream that are not understood here; rows are then served one at a time in them."""
        self.recurrent = any(type(leaf) is ArraysCache for leaf in leaves)
        """Whether a layer keeps a state from which no token can be taken back."""
        self.straight = sum(type(leaf) is KVCache for leaf in leaves)
        """Layers that cache all tokens."""
        self.leaves = len(leaves)
        """Layers that cache something."""
        self.windows = sorted({leaf.max_size for leaf in leaves if type(leaf) is RotatingKVCache})
        """Sliding windows, in tokens."""

    @property
    def trimmable(self) -> bool:
        """Whether tokens can be cut off rows' ends (`slack` of them, where there are windows)."""
        return not self.unknown and not self.recurrent and (not self.windows or self._slack > 0)

    @property
    def cuttable(self) -> bool:
        """Whether a row may begin anywhere within what another one had."""
        return not self.unknown and not self.recurrent and not self.windows

    def upstream(self) -> list[Any]:
        """Upstream's own caches, empty, for one row."""
        caches: list[Any] = make_prompt_cache(self._model)
        return caches

    def quantised(self, how: Quantisation | None, packed_launch: PackedLaunch | None = None) -> Layout:
        """The same with another quantisation."""
        return Layout(
            *(self._model, self._slack, how),
            launch=self.launch,
            packed_launch=packed_launch,
            prompt_launch=self.prompt_launch,
            rotates=self.rotates,
        )

    def new(self, rows: int = 1) -> Caches:
        """Caches of rows that have no tokens yet."""
        if self.unknown:
            return Foreign(self.upstream())
        start = 0 if self.quantisation is None else self.quantisation.start
        positions = Positions(rows, self.sizes, Threshold(start, rows) if start else None)
        layers = [self._layer(template, positions) for template in self._templates]
        return Caches(positions, layers)

    @property
    def sizes(self) -> Sizes:
        """Few where steps are launches, whose graphs are kept, for layers that cache all tokens."""
        launched = not self._precise or self.launch is not None
        packed = self.quantisation is None or self.packed_launch is not None
        return FEW if launched and packed else AS_NEEDED

    @property
    def _precise(self) -> bool:
        """Whether what layers cache of all tokens is as the model makes it, at first at least."""
        return self.quantisation is None or self.quantisation.start > 0

    def prompt_reach(self, capacity: int) -> int:
        """Tokens that rows may come to in a wide call that attends by launches alone, in caches that have room for
        `capacity`: no window's ring may have to wrap. 0 where none does so; known once something was cached."""
        planes = [plane for form in self._forms.values() for plane in form]
        if self.prompt_launch is None or not self._precise or not planes:
            return 0
        if not all(prompt_kernel.takes(width, dtype) for _, width, dtype in planes):
            return 0
        ends = [] if self.quantisation is None else [self.quantisation.start]
        return min([capacity, *ends, *(int(window) + self._slack for window in self.windows)])

    def restore(self, beginnings: Sequence[Beginning | None], reserve: int = 0, ends: Sequence[int] = ()) -> Caches:
        """Caches of a row for each beginning, which is copied (None for no tokens), and room for `reserve` tokens.

        Rows will come to `ends`: where sizes are few, there is room for those as well.
        """
        caches = self.new(len(beginnings))
        caches.restore(beginnings, reserve, ends if self.sizes.few else ())
        return caches

    def _layer(self, template: Any, positions: Positions) -> Any:
        if type(template) is CacheList:
            return CacheList(*(self._layer(part, positions) for part in template.caches))
        if type(template) is RotatingKVCache:
            launches = (self.launch, self.prompt_launch, self._form(template))
            return Window(positions, template.max_size, self._slack, *launches, rotates=self.rotates)
        if type(template) is ArraysCache:
            return Recurrent(positions, len(template.cache))
        quantisation, packed, rotates = self.quantisation, self.packed_launch, self.rotates
        launches = (self.launch, self.prompt_launch, self._form(template))
        if quantisation is None:
            return Straight(positions, *launches, rotates=rotates)
        if positions.threshold is None:
            return Quantised(positions, quantisation, packed, rotates=rotates)
        before = Before(positions, *launches, rotates=rotates)
        after = After(positions, before, quantisation, packed, rotates=rotates)
        return Thresholded(positions, before, after)

    def _form(self, template: Any) -> Form:
        return self._forms.setdefault(id(template), [])


def _known(leaf: Any) -> bool:
    if type(leaf) is RotatingKVCache:
        return not leaf.keep
    return type(leaf) in (KVCache, ArraysCache)
