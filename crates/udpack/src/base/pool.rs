//! [`Pool`]: places for the work that peers cause, divided among those who cause it.
//!
//! A pool holds a fixed number of places. A caller takes one for its [`Tenant`] before some work and gives it back by
//! dropping it. Each tenant has a minimum, and a part of the places is kept for the minimums alone, so a tenant that
//! takes its maximum leaves room for others. A caller that finds no place may wait in a queue of bounded length; a
//! place that becomes free goes to the tenant that holds the fewest.
//!
//! A pool knows nothing of what the places stand for: handshakes, sockets, files, processes, bytes. It keeps no state for
//! tenants that neither hold nor await anything.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

use crate::base::lock;

/// The party from whose share of a [`Pool`] a place is taken. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tenant(Kind);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Kind {
    Address(IpAddr),
    Peer(Arc<str>),
    Unproved,
}

impl Tenant {
    /// All peers at this address: one IPv4 address, or the /64 network of an IPv6 address. Used before a peer is
    /// admitted.
    pub fn address(address: IpAddr) -> Self {
        Self(Kind::Address(network(address)))
    }

    /// All peers with this identity.
    pub(crate) fn identity(id: Arc<str>) -> Self {
        Self(Kind::Peer(id))
    }

    /// All peers whose address QUIC has not validated yet, as one tenant: a source address can be forged.
    pub(crate) fn unproved() -> Self {
        Self(Kind::Unproved)
    }

    fn noun(&self) -> &'static str {
        match self.0 {
            Kind::Address(_) => "this address",
            Kind::Peer(_) => "this token",
            Kind::Unproved => "unproved addresses",
        }
    }
}

/// An address as far as one customer usually holds it: an IPv4 address or an IPv6 /64.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let mut segments = v6.segments();
            segments[4..].fill(0);
            IpAddr::V6(Ipv6Addr::from(segments))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// How the places of a [`Pool`] are divided.
///
/// Start from [`Shares::of`] and change what you must: `Shares { waiting: 64, ..Shares::of(16) }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// Places in all.
    pub places: usize,
    /// Most places that one tenant holds.
    pub each: usize,
    /// Places that a tenant may hold without looking at the `reserve`.
    pub minimum: usize,
    /// Places that no tenant takes beyond its minimum. The first `reserve / minimum` tenants are sure of their minimum,
    /// whatever the others hold.
    pub reserve: usize,
    /// Largest number of waiting callers. A quarter of the queue is kept for tenants without a waiting caller.
    pub waiting: usize,
    /// Largest number of waiting callers of one tenant.
    pub waiting_each: usize,
}

impl Shares {
    /// A quarter of the places is kept for the minimum of each tenant, which is a 64th and at least 1; with fewer than 4
    /// places, none is. One tenant may hold all others. Nobody waits.
    pub const fn of(places: usize) -> Self {
        let minimum = if places < 64 { 1 } else { places / 64 };
        let reserve = match places {
            0..4 => 0,
            4..8 => 2,
            _ => places / 4,
        };
        Self {
            places,
            each: places,
            minimum,
            reserve,
            waiting: 0,
            waiting_each: 0,
        }
    }

    /// The same, with a queue for `waiting` callers; one tenant may have a quarter of them.
    #[must_use]
    pub const fn with_queue(self, waiting: usize) -> Self {
        Self {
            waiting,
            waiting_each: if waiting < 4 { waiting } else { waiting / 4 },
            ..self
        }
    }
}

/// Places for the work that peers cause, divided among [`Tenant`]s. A handle: clones share the places.
///
/// ```
/// # use udpack::{Peer, Pool, Shares, Tenant};
/// let hashes = Pool::new("hashes", Shares::of(8));
/// let anna = Tenant::peer(&Peer::new("anna"));
/// let held: Vec<_> = std::iter::from_fn(|| hashes.try_take(&anna).ok()).collect();
/// assert_eq!(held.len(), 7, "one place is left for the next tenant");
/// assert!(hashes.try_take(&Tenant::peer(&Peer::new("berta"))).is_ok());
/// ```
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

struct Inner {
    what: &'static str,
    shares: Shares,
    refused: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    used: usize,
    /// Places beyond the minimum of their tenant.
    beyond: usize,
    waiting: usize,
    tenants: HashMap<Tenant, Share>,
    /// The next ticket: one is drawn for each place that is assigned and each caller that begins to wait.
    ticket: u64,
}

/// What one tenant holds and waits for; removed when both are zero.
#[derive(Default)]
struct Share {
    held: usize,
    /// The ticket of the last place it got; 0 for a newcomer.
    served: u64,
    queue: VecDeque<Waiter>,
}

struct Waiter {
    ticket: u64,
    amount: usize,
    give: oneshot::Sender<Place>,
}

impl Pool {
    /// A pool of free places. `what` is the plural noun for what they stand for; refusals name it.
    pub fn new(what: &'static str, shares: Shares) -> Self {
        Self {
            inner: Arc::new(Inner {
                what,
                shares,
                refused: AtomicU64::new(0),
                state: Mutex::default(),
            }),
        }
    }

    /// A place for this tenant, if it may have one at once.
    ///
    /// # Errors
    /// When the tenant has its share, or nothing is left.
    pub fn try_take(&self, tenant: &Tenant) -> Result<Place, PoolFull> {
        self.try_take_many(tenant, 1)
    }

    /// Several places as one, if the tenant may have them at once. A `None` is not counted as a refusal.
    pub(crate) fn offer(&self, tenant: &Tenant, amount: usize) -> Option<Place> {
        let taken = self
            .inner
            .take_at_once(&mut lock(&self.inner.state), tenant, amount);
        taken.then(|| self.place(tenant, amount))
    }

    /// Several places as one, all or none.
    ///
    /// # Errors
    /// When the tenant may not have them all at once.
    pub(crate) fn try_take_many(&self, tenant: &Tenant, amount: usize) -> Result<Place, PoolFull> {
        self.offer(tenant, amount)
            .ok_or_else(|| self.refuse(tenant))
    }

    /// A place for this tenant; waits in the queue until there is one.
    ///
    /// # Errors
    /// When the queue is full.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future leaves the queue, and gives back a place that was just assigned to it.
    pub async fn take(&self, tenant: &Tenant) -> Result<Place, PoolFull> {
        self.take_many(tenant, 1).await
    }

    /// Several places as one; waits in the queue until all are free. A number above the tenant's maximum is reduced to it.
    ///
    /// # Errors
    /// When the queue is full.
    ///
    /// # Cancel safety
    /// As [`take`](Self::take).
    pub(crate) async fn take_many(
        &self,
        tenant: &Tenant,
        amount: usize,
    ) -> Result<Place, PoolFull> {
        let shares = &self.inner.shares;
        let amount = amount.min(shares.most());
        let waits = {
            let mut state = lock(&self.inner.state);
            if self.inner.take_at_once(&mut state, tenant, amount) {
                Ok(None)
            } else {
                state.wait(shares, tenant, amount).map(Some).ok_or(())
            }
        };
        let Some((ticket, given)) = waits.map_err(|()| self.refuse(tenant))? else {
            return Ok(self.place(tenant, amount));
        };
        let queued = Queued {
            pool: self,
            tenant,
            ticket,
        };
        let place = given.await;
        drop(queued);
        // The queue holds the sender, and this handle keeps the queue alive.
        place.map_err(|_| self.refuse(tenant))
    }

    /// Places that are taken.
    pub fn used(&self) -> usize {
        lock(&self.inner.state).used
    }

    /// Places that this tenant holds.
    pub fn held(&self, tenant: &Tenant) -> usize {
        let state = lock(&self.inner.state);
        state.tenants.get(tenant).map_or(0, |share| share.held)
    }

    /// Callers that wait.
    pub fn waiting(&self) -> usize {
        lock(&self.inner.state).waiting
    }

    /// Callers that were refused so far.
    pub fn refused(&self) -> u64 {
        self.inner.refused.load(Ordering::Relaxed)
    }

    /// How the places are divided.
    pub fn shares(&self) -> Shares {
        self.inner.shares
    }

    fn place(&self, tenant: &Tenant, amount: usize) -> Place {
        Place {
            pool: self.inner.clone(),
            tenant: tenant.clone(),
            amount,
        }
    }

    fn refuse(&self, tenant: &Tenant) -> PoolFull {
        self.inner.refused.fetch_add(1, Ordering::Relaxed);
        let Shares {
            places,
            each,
            minimum,
            ..
        } = self.inner.shares;
        let (held, used) = (self.held(tenant), self.used());
        let own = held >= each || held >= minimum && used < places;
        PoolFull {
            what: self.inner.what,
            places,
            own: own.then_some((held, tenant.noun())),
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("what", &self.inner.what)
            .field("shares", &self.inner.shares)
            .field("used", &self.used())
            .field("waiting", &self.waiting())
            .finish_non_exhaustive()
    }
}

impl Inner {
    fn take_at_once(&self, state: &mut State, tenant: &Tenant, amount: usize) -> bool {
        let share = state.tenants.get(tenant);
        let held = share.map_or(0, |share| share.held);
        // A new caller does not overtake waiting callers of its tenant.
        if share.is_some_and(|share| !share.queue.is_empty())
            || !state.may(&self.shares, held, amount)
        {
            return false;
        }
        state.grant(&self.shares, tenant, amount);
        true
    }

    /// Applies a change that may free places, then assigns free places to waiting callers.
    fn free(self: &Arc<Self>, change: impl FnOnce(&mut State)) {
        let assigned = {
            let mut state = lock(&self.state);
            change(&mut state);
            state.assign(&self.shares)
        };
        for (tenant, waiter) in assigned {
            let place = Place {
                pool: self.clone(),
                tenant,
                amount: waiter.amount,
            };
            // If the receiver is gone, the place is dropped here, which runs this function again.
            drop(waiter.give.send(place));
        }
    }
}

impl Shares {
    /// The most places that a tenant may hold when no other tenant holds any.
    fn most(&self) -> usize {
        let beyond = self.places.saturating_sub(self.reserve);
        let most = self.minimum.saturating_add(beyond);
        most.min(self.each).min(self.places)
    }
}

impl State {
    /// Whether a tenant that holds `held` places may take `amount` more.
    fn may(&self, shares: &Shares, held: usize, amount: usize) -> bool {
        let (Some(used), Some(then)) = (self.used.checked_add(amount), held.checked_add(amount))
        else {
            return false;
        };
        let more = beyond(shares, then) - beyond(shares, held);
        used <= shares.places
            && then <= shares.each
            && (more == 0 || self.beyond + more <= shares.places.saturating_sub(shares.reserve))
    }

    fn grant(&mut self, shares: &Shares, tenant: &Tenant, amount: usize) {
        let share = self.tenants.entry(tenant.clone()).or_default();
        self.beyond += beyond(shares, share.held + amount) - beyond(shares, share.held);
        share.held += amount;
        self.ticket += 1;
        share.served = self.ticket;
        self.used += amount;
    }

    fn release(&mut self, shares: &Shares, tenant: &Tenant, amount: usize) {
        if let Some(share) = self.tenants.get_mut(tenant) {
            self.beyond -= beyond(shares, share.held) - beyond(shares, share.held - amount);
            share.held -= amount;
            self.used -= amount;
            self.forget(tenant);
        }
    }

    fn forget(&mut self, tenant: &Tenant) {
        let idle = |share: &Share| share.held == 0 && share.queue.is_empty();
        if self.tenants.get(tenant).is_some_and(idle) {
            self.tenants.remove(tenant);
        }
    }

    /// Joins the queue; returns `None` if it is full.
    fn wait(
        &mut self,
        shares: &Shares,
        tenant: &Tenant,
        amount: usize,
    ) -> Option<(u64, oneshot::Receiver<Place>)> {
        let mine = self
            .tenants
            .get(tenant)
            .map_or(0, |share| share.queue.len());
        let room = match mine {
            0 => shares.waiting,
            _ => shares.waiting - shares.waiting / 4,
        };
        if self.waiting >= room || mine >= shares.waiting_each {
            return None;
        }
        self.waiting += 1;
        self.ticket += 1;
        let (give, given) = oneshot::channel();
        let share = self.tenants.entry(tenant.clone()).or_default();
        share.queue.push_back(Waiter {
            ticket: self.ticket,
            amount,
            give,
        });
        Some((self.ticket, given))
    }

    /// Removes a caller that no longer waits from the queue.
    fn leave(&mut self, tenant: &Tenant, ticket: u64) {
        if let Some(share) = self.tenants.get_mut(tenant)
            && let Some(at) = share
                .queue
                .iter()
                .position(|waiter| waiter.ticket == ticket)
        {
            share.queue.remove(at);
            self.waiting -= 1;
            self.forget(tenant);
        }
    }

    /// Assigns free places to waiting callers: the tenant that holds the fewest first, of these the one that got a place
    /// the longest ago.
    fn assign(&mut self, shares: &Shares) -> Vec<(Tenant, Waiter)> {
        let mut assigned = Vec::new();
        while self.waiting > 0 && self.used < shares.places {
            let first = |share: &Share| {
                let head = share.queue.front()?;
                self.may(shares, share.held, head.amount).then_some((
                    share.held,
                    share.served,
                    head.ticket,
                ))
            };
            let next = self.tenants.iter();
            let next = next.filter_map(|(tenant, share)| Some((first(share)?, tenant)));
            let Some(tenant) = next
                .min_by_key(|(order, _)| *order)
                .map(|(_, who)| who.clone())
            else {
                break;
            };
            let queue = self.tenants.get_mut(&tenant).map(|share| &mut share.queue);
            let Some(waiter) = queue.and_then(VecDeque::pop_front) else {
                break;
            };
            self.waiting -= 1;
            self.grant(shares, &tenant, waiter.amount);
            assigned.push((tenant, waiter));
        }
        assigned
    }
}

/// How much of what a tenant holds lies beyond its minimum.
fn beyond(shares: &Shares, held: usize) -> usize {
    held.saturating_sub(shares.minimum)
}

/// A waiting caller; dropping it leaves the queue.
struct Queued<'a> {
    pool: &'a Pool,
    tenant: &'a Tenant,
    ticket: u64,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        let leave = |state: &mut State| state.leave(self.tenant, self.ticket);
        self.pool.inner.free(leave);
    }
}

/// One place of a [`Pool`], or several as one; dropping it gives it back.
#[must_use = "dropping a place gives it back"]
pub struct Place {
    pool: Arc<Inner>,
    tenant: Tenant,
    amount: usize,
}

impl Place {
    /// The tenant whose share the place is taken from.
    pub fn tenant(&self) -> &Tenant {
        &self.tenant
    }

    /// How many places it stands for.
    pub fn amount(&self) -> usize {
        self.amount
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let release =
            |state: &mut State| state.release(&self.pool.shares, &self.tenant, self.amount);
        self.pool.free(release);
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place")
            .field("of", &self.pool.what)
            .field("tenant", &self.tenant)
            .field("amount", &self.amount)
            .finish()
    }
}

/// No place is free, and the queue of waiting callers is full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolFull {
    what: &'static str,
    places: usize,
    own: Option<(usize, &'static str)>,
}

impl PoolFull {
    /// Whether the tenant itself holds all that it may.
    pub fn is_own(&self) -> bool {
        self.own.is_some()
    }
}

impl fmt::Display for PoolFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, places, own } = self;
        match own {
            Some((held, whose)) => write!(f, "{held} {what} of {whose} are in use, its share"),
            None => write!(f, "all {places} {what} are in use"),
        }
    }
}

impl std::error::Error for PoolFull {}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn tenant(name: &str) -> Tenant {
        Tenant::identity(name.into())
    }

    /// Takes places until none is given.
    fn fill(pool: &Pool, tenant: &Tenant) -> Vec<Place> {
        std::iter::from_fn(|| pool.try_take(tenant).ok()).collect()
    }

    async fn soon<F: Future>(future: F) -> F::Output {
        let within = Duration::from_secs(1);
        tokio::time::timeout(within, future).await.expect("soon")
    }

    #[test]
    fn greedy_tenants_leave_each_newcomer_its_minimum() {
        let pool = Pool::new("things", Shares::of(256));
        let greedy: Vec<_> = (0..10)
            .map(|n| fill(&pool, &tenant(&format!("greedy {n}"))))
            .collect();
        assert_eq!(greedy[0].len(), 196, "all but the reserve, and its minimum");
        assert!(greedy[1..].iter().all(|places| places.len() == 4));
        let late = fill(&pool, &tenant("late"));
        assert_eq!(late.len(), 4);
        let full = pool.try_take(&tenant("late")).unwrap_err();
        assert_eq!(
            full.to_string(),
            "4 things of this token are in use, its share"
        );
        assert_eq!(pool.used(), 196 + 10 * 4);
        drop((greedy, late));
        assert_eq!(pool.used(), 0);
        assert!(lock(&pool.inner.state).tenants.is_empty());
        assert_eq!(lock(&pool.inner.state).beyond, 0);
    }

    #[test]
    fn one_tenant_holds_no_more_than_each_may() {
        let shares = Shares {
            each: 2,
            ..Shares::of(100)
        };
        let pool = Pool::new("sockets", shares);
        let address = Tenant::address("192.0.2.7".parse().unwrap());
        let held = fill(&pool, &address);
        assert_eq!(held.len(), 2);
        let full = pool.try_take(&address).unwrap_err();
        assert!(full.is_own());
        assert_eq!(
            full.to_string(),
            "2 sockets of this address are in use, its share"
        );
        assert_eq!(pool.refused(), 2);
        assert!(pool.try_take(&tenant("another")).is_ok());
    }

    #[test]
    fn small_pools_can_be_used_up() {
        for places in 1..4 {
            let pool = Pool::new("things", Shares::of(places));
            let held = fill(&pool, &tenant("anna"));
            assert_eq!(held.len(), places);
            let full = pool.try_take(&tenant("berta")).unwrap_err();
            assert!(!full.is_own());
            assert_eq!(full.to_string(), format!("all {places} things are in use"));
        }
    }

    #[test]
    fn several_places_are_taken_all_or_none() {
        let pool = Pool::new("bytes", Shares::of(100));
        let anna = tenant("anna");
        let most = pool.try_take_many(&anna, 70).unwrap();
        assert!(pool.try_take_many(&anna, 7).is_err());
        assert_eq!(pool.held(&anna), 70);
        assert!(pool.try_take_many(&anna, usize::MAX).is_err());
        drop(most);
        assert!(pool.try_take_many(&anna, 76).is_ok());
    }

    #[test]
    fn an_ipv6_customer_is_one_tenant() {
        let of = |address: &str| Tenant::address(address.parse().unwrap());
        assert_eq!(of("2001:db8:1:2::1"), of("2001:db8:1:2:ffff::9"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_eq!(of("::ffff:192.0.2.7"), of("192.0.2.7"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_free_place_goes_to_whoever_holds_the_fewest() {
        let shares = Shares {
            minimum: 0,
            reserve: 0,
            ..Shares::of(3).with_queue(8)
        };
        let pool = Pool::new("jobs", shares);
        let (greedy, modest) = (tenant("greedy"), tenant("modest"));
        let mut held = fill(&pool, &greedy);
        let wait = |tenant: &Tenant| {
            let (pool, tenant) = (pool.clone(), tenant.clone());
            tokio::spawn(async move { pool.take(&tenant).await })
        };
        let first = wait(&greedy);
        tokio::task::yield_now().await;
        let second = wait(&modest);
        tokio::task::yield_now().await;
        assert_eq!(pool.waiting(), 2);
        held.pop();
        let given = soon(second).await.unwrap().unwrap();
        assert_eq!(given.tenant(), &modest);
        assert!(!first.is_finished());
        drop(given);
        assert_eq!(soon(first).await.unwrap().unwrap().tenant(), &greedy);
    }

    #[tokio::test(start_paused = true)]
    async fn the_queue_has_an_end_and_room_for_a_newcomer() {
        let pool = Pool::new("jobs", Shares::of(1).with_queue(8));
        let (greedy, other) = (tenant("greedy"), tenant("other"));
        let held = pool.try_take(&greedy).unwrap();
        let mut waiting: Vec<_> = (0..2).map(|_| Box::pin(pool.take(&greedy))).collect();
        for waiter in &mut waiting {
            assert!(futures_util::poll!(waiter).is_pending());
        }
        assert!(pool.take(&greedy).await.is_err(), "a quarter of the queue");
        let mut newcomer = Box::pin(pool.take(&other));
        assert!(futures_util::poll!(&mut newcomer).is_pending());
        // Both hold nothing then, and the newcomer has never held anything.
        drop(held);
        let place = soon(newcomer).await.unwrap();
        assert_eq!(place.tenant(), &other);
        drop(place);
        for waiter in waiting {
            drop(soon(waiter).await.unwrap());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_no_longer_waits_loses_no_place() {
        let pool = Pool::new("jobs", Shares::of(1).with_queue(8));
        let anna = tenant("anna");
        for given in [false, true] {
            let held = pool.try_take(&anna).unwrap();
            let mut gone = Box::pin(pool.take(&anna));
            assert!(futures_util::poll!(&mut gone).is_pending());
            let mut stays = Box::pin(pool.take(&anna));
            assert!(futures_util::poll!(&mut stays).is_pending());
            if given {
                // The place is on its way to the one that goes.
                drop(held);
                drop(gone);
            } else {
                drop(gone);
                drop(held);
            }
            drop(soon(stays).await.unwrap());
            assert_eq!((pool.used(), pool.waiting()), (0, 0));
            assert!(lock(&pool.inner.state).tenants.is_empty());
        }
    }
}
