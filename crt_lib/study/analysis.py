"""The per-loop analysis of a run, kept in its folder: traces, a depth sweep, calibrated policies.

What is kept holds numbers only, and a passage of this project's own.
"""

import contextlib
import tomllib
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crt_lib.audit.compare import exit_table
from crt_lib.bench.decode import bench_decode
from crt_lib.exits.decode import Sampling, generate
from crt_lib.exits.perloop import depth_sweep
from crt_lib.exits.trace import Trace, make_passage, make_trace
from crt_lib.files import locked, read_rows, sha256, write_rows
from crt_lib.runs.trained import as_crt, find_checkpoint, gate_run, load_trained, load_trained_model
from crt_lib.study.policies import choices_of, judge_policies, policies_of, promised_rows

if TYPE_CHECKING:
    from crt_lib.exits.choice import Choices

TRACED_TOKENS = 50_000  # of valid and of test
DEPTH_TOKENS = 10_000  # of valid, for the depth sweep
DECODED_TOKENS = 64  # of one text, to measure the ways of decoding
PROMPT_TOKENS = 32  # that they continue
PAPER_TABLE_2 = {  # exit -> (validation loss, PPL, speedup) as the paper has them, its Table 2
    2: (0.0892, 1.093, 4.0),
    4: (0.0812, 1.084, 2.0),
    6: (0.0778, 1.081, 1.33),
    8: (0.0996, 1.105, 1.0),
}
PASSAGES = Path(__file__).with_name("passages.toml")  # by corpus, of this project's own
Rows = list[dict[str, Any]]


class Analysis:
    """The analysis of the run in `folder`: what is kept and of this checkpoint, the rest made.

    Makes an exit gate, `traces/*.safetensors` (`valid`, `test`) and policies.csv (`policies`, rows
    of `judge_policies`) there, from the first `tokens` of train, valid and test (None: as many as
    kept traces hold, else 50,000); other tables when asked for. Raises InputError for a folder
    without a checkpoint of a CRT, and, only where something must be made, for a corpus that cannot
    be had.
    """

    def __init__(self, folder: str | Path, *, fresh: bool = False, tokens: int | None = None):
        folder = self.folder = Path(folder)
        self.fresh = fresh
        loaded, self.tokenizer, self.trained = load_trained_model(folder)
        # after a letter, so that no table takes it for a number
        self.checkpoint = "s" + sha256(find_checkpoint(folder).read_bytes())
        self.model, self.seq_len = as_crt(loaded, folder), self.trained["train"]["seq_len"]
        self._data = cache(lambda: load_trained(folder)[1])  # asked where something must be made
        self._new: dict[str, Rows] = {}  # tables that were made anew with their traces
        files = [folder / "traces" / f"{name}.safetensors" for name in ("valid", "test")]
        kept = [] if fresh else self._kept(files, tokens)
        with contextlib.ExitStack() as held:
            if not kept or self._stale():
                held.enter_context(locked(folder / "analysis"))
                for path in self._stale():
                    path.unlink(missing_ok=True)
                if not fresh:  # what another process has made meanwhile
                    kept = self._kept(files, tokens)
            self.valid, self.test = kept or [self._trace(f, tokens or TRACED_TOKENS) for f in files]
            if not kept:
                self._replace(files)
            # now, before the model is asked in another precision
            self.policies = self._table("policies", self._judge, checkpoint=self.checkpoint)

    def _stale(self) -> list[Path]:
        """What an analysis that was killed while it wrote has left."""
        names = (".*.csv.*.tmp", "traces/.*.tmp", "checkpoints/.gate.*.tmp")
        return [path for name in names for path in self.folder.glob(name)]

    def _kept(self, files: list[Path], tokens: int | None) -> list[Trace]:
        """The traces if both are there, of this checkpoint, as long as asked and as each other."""
        traces = [Trace.load(path) for path in files if path.is_file()]
        found = {(trace.about.get("checkpoint"), trace.about.get("max_tokens")) for trace in traces}
        tokens = tokens or (traces[0].about.get("max_tokens") if traces else None)
        return traces if found == {(self.checkpoint, tokens)} and len(traces) == 2 else []

    def _replace(self, files: list[Path]) -> None:
        """Write the traces; before them, anew, the tables of others, so that no kill loses one."""
        for name, make in (("policies", self._judge), ("depth", self._sweep)):
            if (self.folder / f"{name}.csv").is_file():
                self._new[name] = [row | {"checkpoint": self.checkpoint} for row in make()]
        if self._new:
            files[0].unlink(missing_ok=True)  # so none is taken for what the tables are of
        for name, rows in self._new.items():
            write_rows(self.folder / f"{name}.csv", rows)
        for file, trace in zip(files, (self.valid, self.test), strict=True):
            trace.save(file)

    def _trace(self, file: Path, tokens: int) -> Trace:
        if self.model.gate is None:
            self.model.gate = gate_run(self.folder, tokens).gate
        made = make_trace(self.model, self._data(), file.stem, self.seq_len, max_tokens=tokens)
        made.about.update(checkpoint=self.checkpoint, max_tokens=tokens)
        return made

    def _judge(self) -> Rows:
        return judge_policies(self.model, self._data(), self.valid, self.test)

    def _sweep(self) -> Rows:
        ids = self._data().valid.ids[: min(len(self.valid.loss), DEPTH_TOKENS)]
        return depth_sweep(self.model, ids, self.tokenizer.eot_id, seq_len=self.seq_len)

    @cached_property
    def choices(self) -> "Choices | None":
        """What `crt calibrate` has chosen, where it was called: what `crt generate` takes."""
        return choices_of(find_checkpoint(self.folder))

    @cached_property
    def judged(self) -> Rows:
        """`policies`, and those of `choices`: what each loses on test, exits taken."""
        full = next(row["taken"] for row in self.policies if row["policy"] == "full depth")
        return [*self.policies, *promised_rows(self.choices, full)]

    @cached_property
    def exits(self) -> Rows:
        """Rows of `exit_table`, in exits.csv; a training leaves them there."""
        return self._table("exits", lambda: exit_table(self.model, self._data(), self.seq_len))

    @cached_property
    def depth(self) -> Rows:
        """Rows of `depth_sweep` on valid, in depth.csv."""
        return self._table("depth", self._sweep, checkpoint=self.checkpoint)

    @cached_property
    def decode(self) -> Rows:
        """Rows of a short `crt bench decode`, in decode.csv."""
        new_tokens = min(DECODED_TOKENS, self.model.config.max_seq_len // 2)
        how = {"new_tokens": new_tokens, "compiled": False}
        return self._table(
            "decode",
            lambda: self.bench(self.prompts(2, new_tokens), 1, **how),
            checkpoint=self.checkpoint,
        )

    def _table(self, name: str, make: Callable[[], Rows], **of: str) -> Rows:
        """The rows of the table of that name, made where none is kept, or not `of` these values.

        Every row that is made has them, after its own.
        """
        path = self.folder / f"{name}.csv"
        stands = path.is_file() and (name in self._new or not self.fresh)
        kept = read_rows(path) if stands else []
        if not kept or not of.items() <= kept[0].items():
            write_rows(path, [row | of for row in make()])
        return read_rows(path)

    def prompts(self, count: int, new_tokens: int) -> list[list[int]]:
        """Parts of the passage that `new_tokens` more can follow."""
        ids = self.passage_ids
        longest = min(PROMPT_TOKENS, self.model.config.max_seq_len - new_tokens)
        length = max(1, min(longest, len(ids) // 2))
        starts = [i % (len(ids) - length) for i in range(count)]
        return [ids[start:][:length] for start in starts]

    def bench(self, prompts: Sequence[Sequence[int]], batch_size: int, **how: Any) -> Rows:
        """Rows of `bench_decode` with the policies of this run."""
        policies = policies_of(self.policies)
        losses = {row["policy"]: row["taken"] for row in self.policies}
        how["batch_size"] = batch_size
        rows = bench_decode(self.model, prompts, policies, losses, self.test, **how)
        return [{**row, "checkpoint": self.checkpoint} for row in rows]

    @cached_property
    def passage(self) -> Trace:
        """A text of this project's, traced; for a corpus without one, a text of the model's own."""
        ids = self.passage_ids
        # tokens that were cut off or drawn may be a text of more tokens than they are
        while (
            len(self.tokenizer.encode(self.tokenizer.decode(ids))) > self.model.config.max_seq_len
        ):
            ids = ids[:-1]
        return make_passage(self.model, self.tokenizer, self.tokenizer.decode(ids))

    @cached_property
    def passage_ids(self) -> list[int]:
        """Its tokens, no more than the model has positions for."""
        texts = tomllib.loads(PASSAGES.read_text(encoding="utf-8"))
        text = texts.get(self.trained["data"]["corpus"])
        length = min(self.model.config.max_seq_len, 128)
        if text is not None:
            return self.tokenizer.encode(text)[:length].tolist()
        drawn = Sampling(temperature=0.8)
        (made,) = generate(self.model, [[self.tokenizer.eot_id]], length - 1, sampling=drawn)
        return made.tokens


analyse = Analysis  # as it is asked for
