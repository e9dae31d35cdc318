"""Ways to damage a compressed checkpoint, each with what the error must say."""

from tests.deployment.damages import files, headers, json_files, tensors

DAMAGES = [
    damage
    for generator in (
        files.truncations,
        files.exchanged_shards,
        files.exchanged_files,
        tensors.missing_tensors,
        tensors.exchanged_tensors,
        tensors.changed_tensors,
        tensors.flipped_bits,
        tensors.signed_tensors,
        headers.hostile_lengths,
        headers.hostile_texts,
        headers.hostile_entries,
        headers.relabelled_entries,
        headers.flipped_header_bits,
        headers.broken_digests,
        headers.edited_digests,
        json_files.edited_ranks,
        json_files.edited_forms,
        json_files.added_layers,
        json_files.edited_fields,
        json_files.removed_fields,
        json_files.edited_models,
        json_files.broken_configs,
        json_files.broken_indices,
        json_files.edited_indices,
        json_files.escaping_indices,
    )
    for damage in generator()
]
