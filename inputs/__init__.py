"""From a row in a file, or a user's question, to the ids, labels and pixels that a model takes.

The path of a training row, in reading order:

    rows.py             opens rows: what every format offers, the table of formats, mixtures
    forms.py            a raw row, whatever its keys, to a row as LLaVA's are
    templates.py        the row's conversation to one text, the text to ids and labels
    sample.py           one row to one sample: the whole path in one function
    tiling.py           a picture or a video to the views that the encoder sees

From a name to files, and which format they have:

    folders.py          what a folder holds: files of rows, or pictures with a table or captions
    hub.py              the same of a Hugging Face id, cached or downloaded
    kinds.py            which format a file has, by its content; sniff.py knows what is no rows

The formats find raw rows in files. To add one, read rows.py; its docstring names the places:

    file_rows.py        the base of all: rows in files, one file after the other
    indexed_rows.py     rows that are texts, found by byte offsets; index.py keeps these offsets
    json_rows.py        .json and .jsonl; json_list.py scans a .json
    table_rows.py       .csv and .tsv
    shards.py           .tar, media inside; also writes such files
    parquet_rows.py     .parquet, read by row groups
    caption_rows.py     a folder of pictures with captions

What a raw row says:

    forms.py            which form it has, by its keys: a row as LLaVA's are, with its pictures
    turns.py            the turns of each form, and where pictures stand in them
    media.py            the pictures and videos that a row names

Which rows a stage trains on, and which it holds out:

    holdout.py          a share or a number of rows is held out, and rows rated low are left out
    subset.py           rows chosen of others by number
    content.py          hashes of what a row shows, asks and answers; measure.py keeps such numbers
    duplicates.py       rows that occur twice; overlaps.py: rows that occur in a benchmark

What templates.py stands on:

    conversation.py     turns that alternate, with images in their places
    chat_template.py    the Jinja template that a tokenizer brings along
    tokenizer.py        ids with the characters that each of them stands for
    nanovlm_tokenizer.py  what a config.json of nanoVLM adds to the tokenizer that it names
    vocabulary_file.py  what a tokenizer.json or tokenizer.model may ask for
    bounded.py          a process with limits, for the programs in such files and for templates;
                        bounded_child.py is what runs in it

What tiling.py and sample.py stand on:

    image_processor.py  resize, crop and normalize as the published encoders do
    pictures.py         any picture file to upright RGB, or one line of what is wrong with it
    video.py            the frames of a video that are wanted, and no others
    sniff.py            tells a file that is something else: error pages, zeros

For people to look at, with training/check.py and visualize.py:

    preview.py          what is supervised, marked in a text; pictures in a page
    summary.py          counts and lengths of many samples

Nothing here needs a model's weights: data workers make samples with a tokenizer and a Tiling.
"""
