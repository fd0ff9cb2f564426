"""What the training loop of train.py stands on.

    ranks.py        the processes of a run: how they join, talk to each other and end
    parallel.py     one model on several of them: DDP or FSDP
    state.py        a model and its optimizer, from a checkpoint and into one
    run_log.py      log.jsonl and the progress lines
    recorder.py     the same numbers to TensorBoard or Weights & Biases
    signals.py      SIGTERM and SIGINT, heard between two steps
    output.py       the output folder, from the recipe to the finished model
    made_from.py    what a run is made from, and whether that has changed
    model_card.py   README.md and loss.png beside the finished model
    estimate.py     what a row of a stage costs: operations and hours
    memory.py       what a stage takes of a GPU's memory, by a simulation
    planner.py      --list and --dry-run
    check.py        what `data.py check` and `data.py inspect` do with rows before training

Read train.py first, which uses them all. For --dry-run read estimate.py, memory.py and planner.py.
What makes a run safe to kill is in checkpoints/seal.py and resume.py.
"""
