"""From a file to a parameter and back. Lowest first:

    files.py      a name to a folder, JSON in, any file out atomically
    names.py      tables that rename tensors, in both directions
    weights.py    strict safetensors: each tensor of a file to one parameter, or an error
    folder.py     what the folders of all layouts share
    barellava.py  tinyllava.py  tinyllava_bench.py  hf_llava.py with hf_tokenizer.py
                  one published layout each: config.json and names, read and written
    layouts.py    the table of these layouts; reads a folder of any of them
    seal.py       a checkpoint of a run on the disk: how it becomes whole, how damage is found
    resume.py     saves such checkpoints, and picks the one to go on from

To load a model, read layouts.py and then weights.py. To see why no run is lost, read seal.py and
then resume.py.
"""
