//! Other systems' configurations, turned into ours.
//!
//! What comes out is a configuration that `strowger check` takes. What could not be carried over
//! stands in it as a comment, at the place that it concerns.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use strowger_contract::{Protocol, Transport};
use strowger_sip::Sip;

/// The flags of a destination (Kamailio's `dispatch.h`).
const INACTIVE: u32 = 1;
const TRYING: u32 = 2;
const DISABLED: u32 = 4;
const PROBING: u32 = 8;
const NO_DNS: u32 = 16;
const NO_PING: u32 = 32;

/// Backends of one set, at most: as many as a pool takes.
const DESTINATIONS_MAX: usize = 20_000;

/// What the caller knows that the list does not say.
#[derive(Clone, Debug, Default)]
pub struct KamailioOptions {
    /// The algorithm of each set; [`KamailioOptions::algorithm`] for all others.
    pub algorithms: BTreeMap<i64, u32>,
    /// The algorithm that `ds_select_dst()` is called with; 0 (hash of Call-ID) if not given.
    pub algorithm: u32,
    /// Look host names up now and write the addresses.
    pub resolve: bool,
    /// What the listener binds.
    pub listen: Option<SocketAddr>,
}

/// One line of the list.
#[derive(Debug)]
struct Destination {
    line: usize,
    uri: String,
    place: Result<(Transport, SocketAddr), String>,
    flags: u32,
    priority: i64,
    attrs: Vec<(String, String)>,
}

/// Turns a `dispatcher.list` into a configuration.
///
/// # Errors
/// Lines that are none, each with its number and what was expected. Nothing is left out silently.
pub fn kamailio_dispatcher(text: &str, options: &KamailioOptions) -> Result<String, Vec<String>> {
    let (mut sets, mut errors) = (BTreeMap::<i64, Vec<Destination>>::new(), Vec::new());
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        match destination(line, index + 1, options.resolve) {
            Ok((set, destination)) => sets.entry(set).or_default().push(destination),
            Err(message) => errors.push(format!("line {}: {message}", index + 1)),
        }
    }
    for (set, list) in &sets {
        if list.len() > DESTINATIONS_MAX {
            let count = list.len();
            errors.push(format!(
                "set {set} has {count} destinations; a pool takes {DESTINATIONS_MAX}"
            ));
        }
    }
    if sets.is_empty() && errors.is_empty() {
        errors.push(
            "there is no destination in it; a line is `SET sip:HOST:PORT FLAGS PRIORITY ATTRS`"
                .to_owned(),
        );
    }
    if errors.is_empty() { Ok(write(&sets, options)) } else { Err(errors) }
}

fn destination(line: &str, number: usize, resolve: bool) -> Result<(i64, Destination), String> {
    let mut fields = line.split_ascii_whitespace();
    let set = fields.next().unwrap_or_default();
    let set = set.parse().map_err(|_| format!("`{set}` is no set: expected a whole number"))?;
    let uri = fields.next().ok_or("a destination is missing: expected sip:HOST:PORT")?;
    let place = place(uri, resolve)?;
    let mut whole = |what: &str| match fields.next() {
        None => Ok(0),
        Some(text) => {
            text.parse().map_err(|_| format!("`{text}` is no {what}: expected a whole number"))
        }
    };
    let flags: i64 = whole("flags")?;
    let flags = u32::try_from(flags).map_err(|_| format!("`{flags}` are no flags"))?;
    let priority = whole("priority")?;
    let rest: Vec<&str> = fields.take_while(|field| !field.starts_with('#')).collect();
    let rest = rest.join(" ");
    let pairs = rest.trim_matches('"').split(';').map(str::trim).filter(|pair| !pair.is_empty());
    let attrs = pairs.map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (name.trim().to_owned(), value.trim().to_owned())
    });
    let attrs = attrs.collect();
    Ok((set, Destination { line: number, uri: uri.to_owned(), place, flags, priority, attrs }))
}

/// Transport and address of a destination; inside, why there is none that we can use.
fn place(uri: &str, resolve: bool) -> Result<Result<(Transport, SocketAddr), String>, String> {
    let wrong =
        || format!("`{uri}` is no destination: expected sip:HOST[:PORT][;transport=…] or sips:…");
    let (scheme, rest) = uri.split_once(':').ok_or_else(wrong)?;
    let secure = scheme.eq_ignore_ascii_case("sips");
    if !secure && !scheme.eq_ignore_ascii_case("sip") {
        return Err(wrong());
    }
    let mut parts = rest.split(';');
    let host_port = parts.next().unwrap_or_default();
    let host_port = host_port.rsplit_once('@').map_or(host_port, |(_, host)| host);
    let named = parts.find_map(|part| part.strip_prefix("transport="));
    let transport = match named.unwrap_or("udp").to_ascii_lowercase().as_str() {
        _ if secure => Transport::Tls,
        "udp" => Transport::Udp,
        "tcp" => Transport::Tcp,
        "tls" => Transport::Tls,
        "ws" => Transport::Ws,
        "wss" => Transport::Wss,
        other => return Ok(Err(format!("there is no transport `{other}` to instances"))),
    };
    let default = if transport == Transport::Tls { 5061 } else { 5060 };
    let bracketed = host_port.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let (host, port) = match bracketed {
        Some((host, rest)) => (host, rest.strip_prefix(':')),
        None => {
            host_port.split_once(':').map_or((host_port, None), |(host, port)| (host, Some(port)))
        }
    };
    let port = port.map_or(Ok(default), str::parse).map_err(|_| wrong())?;
    if host.is_empty() || port == 0 {
        return Err(wrong());
    }
    if !matches!(transport, Transport::Udp | Transport::Tcp)
        && !<Sip as Protocol>::TRANSPORTS.contains(&transport)
    {
        return Ok(Err(format!("instances behind {} are not supported", transport.scheme())));
    }
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(Ok((transport, SocketAddr::new(ip, port))));
    }
    if !resolve {
        return Ok(Err(format!("`{host}` is a name; run with --resolve, or write its address")));
    }
    let found = (host, port).to_socket_addrs().ok().and_then(|mut list| list.next());
    Ok(found
        .map(|address| (transport, address))
        .ok_or_else(|| format!("`{host}` does not resolve")))
}

/// What an algorithm is with us: `balance`, `session.key`, and what is different.
struct Meaning {
    balance: &'static str,
    key: Option<&'static str>,
    note: Option<&'static str>,
}

/// The first of these names that the SIP codec knows.
fn key(names: &[&str]) -> Option<&'static str> {
    <Sip as Protocol>::SESSION_KEYS.iter().copied().find(|known| names.contains(known))
}

fn meaning(algorithm: u32) -> Meaning {
    let (balance, key, note) = match algorithm {
        0 => ("hash", key(&["call-id"]), None),
        1 => ("hash", key(&["from"]), None),
        2 => ("hash", key(&["to"]), None),
        3 => ("hash", key(&["ruri-user", "request-user"]), None),
        4 => ("round-robin", None, None),
        5 => (
            "hash",
            key(&["auth-user", "authorization-user"]),
            Some("requests without credentials are placed by Call-ID, not round-robin"),
        ),
        6 => ("weighted-random", None, Some("random; give equal weights")),
        7 => (
            "hash",
            None,
            Some(
                "hashes a pseudo-variable of your script: set session.key to what it held (header:NAME, uri-param:NAME)",
            ),
        ),
        8 => (
            "priority",
            None,
            Some("serial by priority: the next group only when the one before is down"),
        ),
        9 => ("weighted-random", None, None),
        10 => (
            "least-loaded",
            None,
            Some(
                "calls are counted by the edge itself: ds_load_update() and ds_load_unset() have no equal and need none",
            ),
        ),
        11 => (
            "weighted-random",
            None,
            Some(
                "relative weights over those that are up: weights are always relative here; `cc` has no equal",
            ),
        ),
        12 => (
            "hash",
            None,
            Some("parallel forking over a set has no equal; new calls are placed by hash"),
        ),
        13 => (
            "least-loaded",
            None,
            Some("by what is under way and by response time of live traffic, not of OPTIONS"),
        ),
        14 => {
            ("priority", None, Some("round-robin within equal priorities is weighted random here"))
        }
        15 => ("priority", None, None),
        64 => (
            "least-loaded",
            None,
            Some(
                "RFC 7339: the pool's slots and the adaptive limit do what skipping overloaded ones did",
            ),
        ),
        _ => (
            "priority",
            None,
            Some("unknown to Kamailio as well, which takes the first entry: serial by priority"),
        ),
    };
    Meaning { balance, key, note }
}

fn write(sets: &BTreeMap<i64, Vec<Destination>>, options: &KamailioOptions) -> String {
    let mut out = String::new();
    let listen = options.listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 5060)));
    let line = |out: &mut String, text: String| {
        // Writing to a string cannot fail.
        let _ok = writeln!(out, "{text}");
    };
    line(&mut out, "# From a Kamailio dispatcher list, by `strowger import kamailio`.".into());
    line(&mut out, "# `#!` marks what could not be carried over.".into());
    line(&mut out, "version: 1\nlisteners:\n  - name: sip\n    protocol: sip".into());
    let mut transports: Vec<&str> = vec!["udp", "tcp"];
    transports.retain(|name| {
        *name == "udp"
            || sets.values().flatten().any(|entry| matches!(entry.place, Ok((Transport::Tcp, _))))
    });
    let binds: Vec<String> =
        transports.iter().map(|name| format!("\"{name}://{listen}\"")).collect();
    line(&mut out, format!("    bind: [{}]", binds.join(", ")));
    if let Some(first) = sets.keys().next() {
        line(&mut out, format!("    pool: {}", pool_name(*first)));
    }
    if sets.len() > 1 {
        let others: Vec<String> = sets.keys().skip(1).map(|set| pool_name(*set)).collect();
        line(&mut out, "    #! Which set a request goes to is decided in your script by ds_select_dst(SET, …); say it here:".into());
        line(&mut out, "    # routes:".into());
        for other in others {
            line(
                &mut out,
                format!("    #   - {{ match: {{ domain: [example.net] }}, pool: {other} }}"),
            );
        }
    }
    line(&mut out, "pools:".into());
    for (set, list) in sets {
        let algorithm = options.algorithms.get(set).copied().unwrap_or(options.algorithm);
        pool(&mut out, *set, list, algorithm);
    }
    out
}

fn pool_name(set: i64) -> String {
    if set < 0 { format!("set-minus-{}", set.unsigned_abs()) } else { format!("set-{set}") }
}

fn pool(out: &mut String, set: i64, list: &[Destination], algorithm: u32) {
    let meaning = meaning(algorithm);
    let mut line = |text: String| {
        let _ok = writeln!(out, "{text}");
    };
    line(format!("  {}:    # algorithm {algorithm}", pool_name(set)));
    if let Some(note) = meaning.note {
        line(format!("    #! algorithm {algorithm}: {note}"));
    }
    line(format!("    balance: {}", meaning.balance));
    if let Some(key) = meaning.key {
        line(format!("    session: {{ key: {key} }}"));
    }
    let probed = list.iter().any(|entry| entry.flags & PROBING != 0);
    if probed {
        line("    health: { probe: sip-options }".into());
    }
    let ranks = ranks(list, algorithm);
    if ranks.is_empty() && list.iter().any(|entry| entry.priority != list[0].priority) {
        // Here they would make groups, of which only the first gets anything.
        line(format!("    #! priorities only order the list with algorithm {algorithm}: left out"));
    }
    let weights = weights(list, algorithm);
    let (mut ids, mut places) = (HashSet::new(), HashMap::new());
    let mut any = false;
    for (at, entry) in list.iter().enumerate() {
        let (weight, odd) = weights[at].clone();
        for note in notes(entry, algorithm, probed).into_iter().chain(odd) {
            if !any {
                // A comment needs a list to stand in.
                line("    backends:".into());
                any = true;
            }
            line(format!("      #! line {}: {note}", entry.line));
        }
        if !any {
            line("    backends:".into());
            any = true;
        }
        let rank = ranks.get(at).copied().unwrap_or(0);
        match &entry.place {
            Err(why) => line(format!(
                "      #! line {}: {} is left out: {why}",
                entry.line,
                printable(&entry.uri)
            )),
            Ok(place) if places.contains_key(place) => {
                line(format!(
                    "      #! line {}: {} is left out: line {} has its address",
                    entry.line,
                    printable(&entry.uri),
                    places[place]
                ));
            }
            Ok((transport, address)) => {
                places.insert((*transport, *address), entry.line);
                line(backend(entry, (*transport, *address), rank, weight, &mut ids));
            }
        }
    }
    if places.is_empty() {
        line("      []".into());
    }
}

/// Which priority group each is in, from 0 on; empty where priorities make no groups.
///
/// With Kamailio the largest number comes first, with us the smallest.
fn ranks(list: &[Destination], algorithm: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..list.len()).collect();
    order.sort_by_key(|&at| (std::cmp::Reverse(list[at].priority), at));
    let mut ranks = vec![0; list.len()];
    match algorithm {
        0..=7 | 9..=12 | 64 => return Vec::new(),
        // Groups of one priority: 13 and 14 take turns in the first one, 15 draws by weight.
        13..=15 => {
            let mut group = 0;
            for pair in order.windows(2) {
                group += usize::from(list[pair[0]].priority != list[pair[1]].priority);
                ranks[pair[1]] = group;
            }
        }
        // One after the other; the file's order decides between equals.
        _ => order.iter().enumerate().for_each(|(rank, &at)| ranks[at] = rank),
    }
    ranks
}

/// The weight of each and what is odd about it. `None`: none is written, and all are alike.
fn weights(list: &[Destination], algorithm: u32) -> Vec<(Option<u16>, Option<String>)> {
    let given = |entry: &Destination, name: &str| {
        attr(entry, name).and_then(|text| text.parse::<u16>().ok())
    };
    let mut out = vec![(None, None); list.len()];
    match algorithm {
        // A table of 100 places, filled from the first on.
        9 => {
            let mut order: Vec<usize> = (0..list.len()).collect();
            order.sort_by_key(|&at| (std::cmp::Reverse(list[at].priority), at));
            let mut left = 100;
            for &at in &order {
                let wanted = given(&list[at], "weight").filter(|weight| *weight <= 100);
                let weight = wanted.unwrap_or(0).min(left);
                left -= weight;
                let odd = (weight == 0 || wanted != Some(weight)).then(|| {
                    "algorithm 9 gives it only what is left of 100, and nothing without a weight of 1 to 100"
                        .to_owned()
                });
                out[at] = (Some(weight), odd);
            }
            if let Some(&last) = order.last().filter(|_| left > 0) {
                let weight = out[last].0.unwrap_or(0) + left;
                let odd = format!(
                    "the weights' sum is {}: algorithm 9 gives the rest to the last one",
                    100 - left
                );
                out[last] = (Some(weight), Some(odd));
            }
        }
        11 => {
            for (at, entry) in list.iter().enumerate() {
                let weight = given(entry, "rweight").filter(|weight| (1..=100).contains(weight));
                let odd = weight
                    .is_none()
                    .then(|| "algorithm 11 gives nothing without a rweight of 1 to 100".to_owned());
                out[at] = (Some(weight.unwrap_or(0)), odd);
            }
        }
        15 => {
            for (at, entry) in list.iter().enumerate() {
                out[at].0 = given(entry, "weight");
            }
        }
        _ => {}
    }
    out
}

fn attr<'a>(entry: &'a Destination, name: &str) -> Option<&'a str> {
    entry.attrs.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

fn backend(
    entry: &Destination,
    (transport, address): (Transport, SocketAddr),
    rank: usize,
    weight: Option<u16>,
    ids: &mut HashSet<String>,
) -> String {
    let wanted = attr(entry, "duid").filter(|id| !id.is_empty());
    let plain = |text: &str| {
        text.chars()
            .map(|letter| {
                if letter.is_ascii_alphanumeric() || "-_.".contains(letter) { letter } else { '-' }
            })
            .collect::<String>()
    };
    let base = plain(&wanted.map_or_else(|| address.to_string(), str::to_owned))
        .trim_matches('-')
        .to_owned();
    let mut id = base.clone();
    let mut number = 2;
    while !ids.insert(id.clone()) {
        id = format!("{base}-{number}");
        number += 1;
    }
    let mut text =
        format!("      - {{ id: \"{id}\", address: \"{}://{address}\"", transport.scheme());
    if let Some(weight) = weight {
        let _ok = write!(text, ", weight: {weight}");
    }
    if rank > 0 {
        let _ok = write!(text, ", priority: {}", rank + 1);
    }
    if let Some(most) = attr(entry, "maxload")
        .and_then(|most| most.parse::<u32>().ok())
        .filter(|most| (1..=100_000_000).contains(most))
    {
        let _ok = write!(text, ", capacity: {most}");
    }
    if entry.flags & DISABLED != 0 {
        text.push_str(", state: suspended");
    }
    text.push_str(" }");
    text
}

/// What of a line has no place in a backend.
fn notes(entry: &Destination, algorithm: u32, probed: bool) -> Vec<String> {
    let mut notes = Vec::new();
    for (flag, what) in [
        (INACTIVE, "flag 1 (inactive): health is found out anew"),
        (TRYING, "flag 2 (trying): health is found out anew"),
        (NO_DNS, "flag 16 (no DNS at start): has no equal"),
        (NO_PING, "flag 32 (no pings): probing is per pool here"),
    ] {
        if entry.flags & flag != 0 && (flag != NO_PING || probed) {
            notes.push(what.to_owned());
        }
    }
    let known = INACTIVE | TRYING | DISABLED | PROBING | NO_DNS | NO_PING;
    if entry.flags & !known != 0 {
        notes.push(format!("flags {}: unknown", entry.flags & !known));
    }
    let mut seen = HashSet::new();
    for (name, value) in &entry.attrs {
        let shown = printable(&format!("{name}={value}"));
        if !seen.insert(name.as_str()) {
            notes.push(format!("{shown}: stands twice; the first counts"));
            continue;
        }
        let why = match name.as_str() {
            "duid" if !value.is_empty() => continue,
            "weight" if matches!(algorithm, 9 | 15) && value.parse::<u16>().is_ok() => continue,
            "rweight" if algorithm == 11 && value.parse::<u16>().is_ok() => continue,
            "weight" | "rweight" if value.parse::<u16>().is_ok() => {
                "is not what this algorithm looks at"
            }
            "maxload" if value == "0" => "0 means no limit: no capacity is set",
            "maxload" if value.parse::<u32>().is_ok_and(|most| most <= 100_000_000) => continue,
            "weight" | "rweight" | "maxload" => "is no number that fits",
            "socket" | "sockname" => {
                "the edge sends from the listener's socket of that family; bind it there"
            }
            "ping_from" => "probes carry the edge's own address in From",
            "obproxy" => "there is no outbound proxy per instance; name the proxy as the instance",
            "cc" => "congestion is seen from live traffic",
            "latency" => "latency is measured anew",
            "ocmin" | "ocmax" | "ocrate" | "ocseq" => {
                "overload is signalled by RFC 7339 or seen from live traffic"
            }
            _ => "is your script's own and has no place here",
        };
        notes.push(format!("{shown}: {why}"));
    }
    notes
}

/// Text for a comment: one line, whatever is in it.
fn printable(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { '?' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn load(yaml: &str) -> Result<crate::control::config::Loaded, String> {
        let protocols = crate::protocols::Protocols::standard();
        let source = crate::control::config::Source { name: "x".into(), text: yaml.into() };
        let names = crate::routing::PoolNames::default();
        crate::control::config::load(&[source], &protocols.configurers(), &names)
            .map_err(|errors| errors.to_string())
    }

    proptest! {
        /// Whatever the list says, what comes out is a good configuration, or there are errors.
        #[test]
        fn what_comes_out_is_taken(
            lines in prop::collection::vec(("-?[0-9]{1,2}", "(sip|sips|tel):[a-z0-9.@;=:\\[\\]]{1,20}", "[0-9]{0,2}", "-?[0-9]{0,2}", "[ -~]{0,30}"), 1..8),
            algorithm in 0u32..70,
        ) {
            let text: String = lines.iter().map(|(set, uri, flags, priority, attrs)| format!("{set} {uri} {flags} {priority} {attrs}\n")).collect();
            if let Ok(yaml) = kamailio_dispatcher(&text, &KamailioOptions { algorithm, ..KamailioOptions::default() }) {
                prop_assert!(load(&yaml).is_ok(), "{}\n{yaml}", load(&yaml).err().unwrap_or_default());
            }
        }

        #[test]
        fn addresses_are_taken(octets in prop::collection::vec(1u8..250, 1..20), algorithm in 0u32..16) {
            let text: String = octets.iter().map(|octet| format!("{} sip:10.0.0.{octet}:5060;transport=tcp 8 {} duid=a;weight={octet};maxload={octet}\n", octet % 3, octet % 4)).collect();
            let yaml = kamailio_dispatcher(&text, &KamailioOptions { algorithm, ..KamailioOptions::default() });
            let loaded = load(&yaml.expect("good")).expect("a good configuration");
            let all: HashSet<(u8, u8)> = octets.iter().map(|octet| (octet % 3, *octet)).collect();
            prop_assert_eq!(loaded.spec.pools.iter().map(|pool| pool.backends.len()).sum::<usize>(), all.len());
        }
    }

    #[test]
    fn every_algorithm_means_something() {
        for algorithm in (0..16).chain([64, 99]) {
            let options = KamailioOptions { algorithm, ..KamailioOptions::default() };
            let yaml = kamailio_dispatcher("1 sip:10.0.0.1", &options).expect("good");
            assert!(load(&yaml).is_ok(), "{algorithm}: {yaml}");
        }
    }

    #[test]
    fn mistakes_are_told_with_their_lines() {
        let text = "# a list\nx sip:10.0.0.1\n1\n1 http://x\n1 sip:10.0.0.1:99999\n1 sip:10.0.0.1 a\n1 sip:10.0.0.1 0 b\n";
        let errors = kamailio_dispatcher(text, &KamailioOptions::default()).expect_err("wrong");
        let lines: Vec<&str> =
            errors.iter().map(|error| error.split(':').next().unwrap_or("")).collect();
        assert_eq!(lines, ["line 2", "line 3", "line 4", "line 5", "line 6", "line 7"]);
        assert!(kamailio_dispatcher("# nothing\n", &KamailioOptions::default()).is_err());
    }
}
