# fish completion for nbdserver; written by `nbdserver completion fish`.
function __nbdserver_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l program $words[1]
    set -e words[1]
    for line in ($program complete -- $words "$current" 2>/dev/null)
        if test "$line" = ":files"
            __fish_complete_path "$current"
        else
            echo $line
        end
    end
end
complete -c nbdserver -f -a "(__nbdserver_complete)"
