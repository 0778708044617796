# bash completion for nbdserver; written by `nbdserver completion bash`.
_nbdserver() {
    local line=${COMP_LINE:0:COMP_POINT} breaks=${COMP_WORDBREAKS//[!@=:]/} cut="" words current candidate candidates
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current=${words[-1]}
    # bash takes `@`, `=` and `:` for ends of words: what stands before the last of them is not to be given again.
    [[ -n $breaks && $current == *[$breaks]* ]] && cut=${current%"${current##*[$breaks]}"}
    mapfile -t candidates < <("$1" complete -- "${words[@]:1}" 2>/dev/null)
    COMPREPLY=()
    for candidate in "${candidates[@]}"; do
        candidate=${candidate%%$'\t'*}
        if [[ $candidate == :files ]]; then
            compopt -o default
        else
            [[ $candidate == *[@=] ]] && compopt -o nospace
            COMPREPLY+=("${candidate#"$cut"}")
        fi
    done
}
complete -F _nbdserver nbdserver
