# %% [markdown]
# # A tour in a notebook
#
# The built-in VLM is audited at two exits, aligned for two steps, audited again, compared and cut. Each command of the
# command line is a function, with the same options as keywords. Two steps change the model hardly at all: see
# [align a model](howto/align.md) for settings that do. `make tour` makes this page from `docs/tour.py`.
#
# > **Content warning.** An audit makes a model answer harmful requests. The frames below show labels, not answers.

# %%
from exitwise import Run, align, audit, compare, load_vlm, slim

vlm = load_vlm("testbed")
vlm

# %% [markdown]
# One question at two exits: the encoder stops after block 2, and where the model was trained (`default`).

# %%
vlm.answer("photo:coffee", "What is this?", exits="2,default")

# %% [markdown]
# An audit asks harmful and harmless prompts and questions with a known answer at each exit. It returns a `Run`, the run
# directory as an object; `Run.open("runs/before")` opens it again later.

# %%
before = audit(vlm, exits="8,default", limit=8, out="runs/before")
before

# %%
before.figures()[["exit", "asr", "asr_low", "asr_high", "over_refusal", "utility", "standing", "may_stop"]]

# %%
let_through = before.answers().query("exit == '8' and label == 'answered'")
let_through[["sample", "exit", "kind", "category", "prompt", "finish", "label"]].head()

# %%
before.plot()

# %% [markdown]
# L-PPO trains a LoRA adapter on the image features of exit 8. `history()` is the log of the training.

# %%
tuned = align("testbed", exits="8", steps=2, out="runs/aligned")
tuned.history()[["rollout/asr", "objective/kl", "objective/scores"]]

# %%
tuned.history().plot(y="rollout/asr")

# %% [markdown]
# The same audit with the adapter, and the difference: each prompt is its own control.

# %%
after = audit("testbed", adapter=tuned, exits="8,default", limit=8, out="runs/after")
compare(before, after).table()

# %% [markdown]
# A checkpoint whose encoder ends at exit 8, for stock transformers and other runtimes.

# %%
slim("testbed", exit=8, adapter=tuned, out="slim/8")

# %%
Run.open("runs/after").answer.headline
